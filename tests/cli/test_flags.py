"""Every command tells what can be set, and refuses what is wrong in one line that helps."""

import re
import sys

import pytest
from absl import flags

from sapo_jax import cli, model, report, tasks
from sapo_jax.cli import __main__ as console
from sapo_jax.data import hf_json
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.training.metrics import METRICS
from tests import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # by runpy
TINY = "--config=tests/tiny_config.py"


@pytest.fixture
def sapo(monkeypatch, capfd):
    """``sapo-jax …`` in this process: (exit status, what it prints, what it complains)."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sapo-jax", *arguments])
        flags.FLAGS.unparse_flags()  # absl's own are those of the process
        with pytest.raises(SystemExit) as end:
            console.main()
        out, err = capfd.readouterr()
        if isinstance(end.value.code, str):  # Python prints it, and exits with 1
            return 1, out, err + end.value.code + "\n"
        return end.value.code or 0, out, err

    yield run
    flags.FLAGS.unparse_flags()
    flags.FLAGS.mark_as_parsed()


FLAGS = {
    "train": "config reward workdir coordinator processes process",
    "sweep": "config reward workdir axis most job_index job_count coordinator processes process",
    "evaluate": "hf workdir which task eval reward prompts samples temperature top_k top_p "
    "max_prompt_tokens max_image_tokens max_new_tokens batch seed workers dtype chat system "
    "template_options out compilation_cache",
    "export": "workdir out which adapters",
    "report": "picture",
    "preflight": "config topology programs fit runs json",
    "datasets": "jsonl catalogue out prompt answer demonstration",
    "list": "",
}


def test_help_is_in_whole_sentences(sapo):
    """Nothing that absl adds; calls that work; and which defaults are not those of a run."""
    _, out, _ = sapo("evaluate", "--help")
    assert "repeat this option" not in out
    assert "sapo-jax evaluate --workdir=… [flags]\n" in out
    assert "sapo-jax evaluate --hf=… --task=… [flags]\n" in out
    assert re.search(r"--samples=16 +\* Completions per prompt", out)
    assert "with --workdir the defaults marked * are the run's" in out
    _, out, _ = sapo("train", "--help")
    assert "sapo-jax train --config=… --workdir=… [flags] [--config.<field>=…]\n" in out


@pytest.mark.parametrize("command", FLAGS)
def test_help_shows_what_can_be_set(sapo, command):
    """Its own flags and the config's fields, and none of the hundreds of imported libraries."""
    status, out, err = sapo(command, "--help")
    assert (status, err) == (0, "")
    own, _, fields = out.partition("Fields of")
    shown = set(re.findall(r"^  --(\w+)", own, re.M))
    assert shown == {*FLAGS[command].split(), "help", "verbosity"}
    assert f"python -m {cli.COMMANDS[command][0]}" in out
    assert bool(fields) == ("config" in shown)
    for field in cli.flat(cli.from_config("base")) if fields else ():
        assert f"\n  --config.{field}=" in fields
    if fields:
        assert re.search(r"--config.batch.group_size=8 +completions per prompt\n", fields)


def test_help_shows_the_values_of_a_config(sapo):
    status, out, _ = sapo("train", TINY, "--config.seed=3", "--help")
    assert status == 0
    assert "Fields of --config=tests/tiny_config.py" in out
    for text in ("iterations=6", "task.options.modulus=10", "model.preset='nano'", "seed=3"):
        assert f"\n  --config.{text} " in out


def test_nothing_is_left_of_an_earlier_command_line():
    from sapo_jax import evaluate

    evaluate.FLAGS.parse(["evaluate", "--hf=a", "--task=maze,cells=3", "--samples=3"])
    given = evaluate.FLAGS.parse(["evaluate", "--workdir=b"])
    assert (given.workdir, given.hf, given.task, given.samples) == ("b", "", [], 16)
    assert not given["samples"].present


CONFIG = """from configs import base


def get_config():
    c = base.get_config()
    {}
    return c
"""
FILES = {
    "syntax.py": "def get_config(:\n    pass\n",
    "field.py": CONFIG.format("c.lerner = 3"),
    "zero.py": CONFIG.format("c.iterations = 1 // 0"),
    "without.py": "x = 1\n",
    "ends.py": "import sys\nsys.exit()\n",
    "dict.py": CONFIG.replace("return c", "return c.to_dict()").format(""),
    "frozen.py": CONFIG.replace("return c", "return FrozenConfigDict(c)").format(
        "from ml_collections import FrozenConfigDict"
    ),
    "bare.py": CONFIG.replace("return c", "return type(c)()").format(""),
    "key.py": CONFIG.format("c.task.options = {3: 4}"),
    "needs.py": CONFIG.format("c.unlock(); c.name = config_dict.required_placeholder(str)").replace(
        "\n\n", "\nfrom ml_collections import config_dict\n", 1
    ),
    "cut/config.json": '{"iterations": 3, "learner": {',
    "list/config.json": "[1]",
    "section/config.json": '{"iterations": 3, "learner": 3, "sampler": {}}',
    "icons/manifest.json": '{"runs": [{"name": "a"}]}',
    "none/report.json": '{"settings": [], "hours": 0}',
    "pod/preflight.json": '{"checks": [3], "refused": {}}',
    "starts/config.json": "{}",
    "starts/provenance.json": "[3]",
    "lines/metrics/part-00000.jsonl": '{"update": 1}\n',
    "parts/metrics": "",
    "lab.json": '{"stages": [{}]}',
    "math.jsonl": '{"question": "1+1?", "answer": "2"}\n',
}
WRONG = [  # command line, and what the one line says
    ("trai", "unknown command 'trai'; the nearest is 'train'"),
    ("gradlab", "unknown command 'gradlab'; must be one of train, sweep, evaluate, export"),
    ("train", "--config is missing: The experiment"),
    (f"train {TINY}", "--workdir is missing: Run directory"),
    ("train --config=quickstrt", "no such file", "the nearest is quickstart", "list configs"),
    ("train --config=missing.py", "there is no such file (see sapo-jax list configs)"),
    ("train --config=RUN/syntax.py", "syntax.py, line 1: invalid syntax"),
    ("train --config=RUN/field.py", 'field.py, line 6: AttributeError: \'Key "lerner"', "learner"),
    ("train --config=RUN/zero.py", "zero.py, line 6: ZeroDivisionError"),
    ("train --config=RUN/without.py", "must have a function get_config()"),
    (f"train {TINY} --workdr=RUN/x", "unknown flag --workdr; the nearest is --workdir"),
    (f"train {TINY} --learner.learning_rate=1", "--config.learner.learning_rate=<value>"),
    (f"train {TINY} --learning_rate=1", "--config.learner.learning_rate=<value>"),
    (f"train {TINY} learning_rate=3", "'learning_rate=3'", "--config.<field>=<value>"),
    (f"train {TINY} --config.lerner.schedule=linear", "nearest is --config.learner.schedule"),
    (f"train {TINY} --config.learner.learning_rat=1", "nearest is --config.learner.learning_rate"),
    (f"train {TINY} --config.sampler.shrink=2", "config.sampler.shrink: there is no such field"),
    (f"train {TINY} --config.batch.prompts=many", "batch.prompts=many: must be a whole number"),
    (f"train {TINY} --config.learner.b1=x", "--config.learner.b1=x: must be a number"),
    (f"train {TINY} --config.learner.remat=x", "learner.remat=x: must be true or false"),
    (f"train {TINY} --config.task.options={{'terms':true}}", "task.options=", "True, False, None"),
    (f"train {TINY} --config.task.options=3", "task.options=3: must be a dictionary"),
    (f"train {TINY} --config.tasks.a.options.terms=3", "tasks.a.options.terms: there is no such"),
    (
        f"train {TINY} --config.task={{}} --config.task.options.numbers=3",
        "such field in --config.task",
    ),
    (
        f"train {TINY} --workdir=RUN/x --reward=my.py:x",
        "error: --reward: my.py:x: there is no",
    ),
    (f"train {TINY} --config.objective.a-b=3", "--config.objective.a-b: there is no such field"),
    (f"train {TINY} --config.task.options.slip=true", "slip=true", "True, False, None"),
    (f"train {TINY} --workdir=RUN/x --config.task.options.slp=1", "['slp']", "nearest is 'slip'"),
    (f"train {TINY} --workdir=RUN/x --config.objective.k_pos=1", "no hyperparameter 'k_pos'"),
    (f"train {TINY} --workdir=RUN/x --config.dtype.compute=f16", "config.dtype.compute='f16'"),
    (f"train {TINY} --workdir=RUN/x --config.objective.name=gpro", "the nearest is 'grpo'"),
    (f"train {TINY} --workdir=RUN/x --config.model.head_dim=3", "config.model.head_dim=3"),
    ("train --config.seed=3", "--config.seed: of which config?"),
    (f"train {TINY} --workdir=RUN/x --config.objective.tau_neg=-1", "tau_neg=-1.0", "> 0"),
    (f"train {TINY} --workdir=RUN/x --process=1", "--coordinator, --processes missing"),
    (
        f"sweep {TINY} --workdir=RUN/x",
        "tiny_config.py: must have a function get_sweep(): it returns",
    ),
    (f"sweep {TINY} --workdir=RUN/x --axis=seed=0,1", "--axis=seed=0,1 only chooses among these"),
    ("sweep --config=sweeps/temperature --workdir=RUN/x --job_index=1", "below --job_count=1"),
    ("report", "PATH is missing: Directory of a run or a sweep"),
    ("report RUN/nothing", "RUN/nothing does not exist"),
    ("report RUN", "nothing to show in RUN"),
    ("report RUN more", "unknown argument 'more'"),
    ("evaluate --config.tokenizer.chat=False", "--config.tokenizer.chat; the flag is --chat"),
    ("evaluate --zzz=3", "unknown flag --zzz (see --help)"),
    ("evaluate --task=chain_sum", "--hf is missing, or --workdir of a run"),
    ("evaluate --hf=RUN", "--task is missing: NAME,option=value"),
    (
        "evaluate --hf=RUN --task=chain_sum --reward=sum",
        "error: --reward='sum': must be a function",
    ),
    ("evaluate --hf=RUN --task=chain_sum", "RUN/config.json: no such file"),
    ("evaluate --hf=RUN --task=chain_sm", "--task=chain_sm: unknown task", "'chain_sum'"),
    ("evaluate --hf=RUN --task=chain_sum,tems=3", "--task=chain_sum,tems=3: ", "is 'terms'"),
    ("evaluate --hf=RUN --task=chain_sum,terms=null", "terms=null: must be written as in Python"),
    ("export --workdir=RUN --out=RUN/x", "RUN has no config.json: name the --workdir"),
    (
        "export --workdir=RUN --out=RUN/x --which=bst",
        "--which=bst: must be one of latest, best; the nearest",
    ),
    ("datasets --out=RUN/x", "--jsonl=SPLIT=FILE, once or more, or --catalogue=NAME is missing"),
    ("datasets --out=RUN/x --catalogue=gsm9k", "unknown dataset 'gsm9k'", "gsm8k"),
    ("preflight --config=quickstart", "--topology is missing: Such as v5e:4x4"),
    ("preflight --config=quickstart --topology=v5x:4", "--topology='v5x:4': must be", "v5e, v5p"),
    ("preflight --config=quickstart --topology=v5e:0x4", "--topology='v5e:0x4': must be"),
    ("preflight --config=quickstart --topology=v5e:9999x9999", "of 1 to 16384 chips"),
    # Files and directories: broken, of another shape, or the one where the other belongs.
    (f"train {TINY} --workdir=RUN/cut", "RUN/cut/config.json: is not JSON", "remove it"),
    ("export --workdir=RUN/cut --out=RUN/x", "RUN/cut/config.json: is not JSON", "remove it"),
    ("evaluate --workdir=RUN/list", "RUN/list/config.json: is [1], must be an object"),
    ("export --workdir=RUN/section --out=RUN/x", "section/config.json: config.learner=3: must be"),
    ("report RUN/cut", "RUN/cut/config.json: is not JSON"),
    ("report RUN/icons", "icons/manifest.json: runs [0] has no 'directory'; it has name"),
    ("report RUN/none", "RUN/none cannot be shown", "another shape"),
    ("report RUN/pod", "pod/preflight.json: checks [0] is 3, must be an object"),
    ("report RUN/starts", "starts/provenance.json: [0] is 3, must be an object"),
    ("report RUN/lines", "part-00000.jsonl, line 1: no field 'iteration'; it has update"),
    ("report RUN/parts", "RUN/parts/metrics: is a file", "must be a directory"),
    ("report RUN/lab.json", "lab.json: stages [0] has no"),
    ("report RUN/section --picture=RUN/zero.py/a.png", "--picture=", "zero.py is a file"),
    ("sweep --config=sweeps/temperature --workdir=RUN/zero.py", "zero.py: is a file; must be a"),
    ("sweep --config=sweeps/temperature --workdir=RUN/zero.py/x", "RUN/zero.py is a file; must be"),
    (f"train {TINY} --workdir=RUN/zero.py/x", "--workdir=", "RUN/zero.py is a file; must be a dir"),
    (f"train {TINY} --workdir=RUN/x --config.compilation_cache=RUN/zero.py", "n_cache=RUN/zero.py"),
    ("evaluate --hf=RUN --task=chain_sum --compilation_cache=RUN/zero.py", "directory to write in"),
    ("evaluate --hf=RUN --task=chain_sum --out=RUN/zero.py/x", "RUN/zero.py is a file; must be"),
    ("preflight --config=quickstart --topology=v5e:4x4 --json=RUN", "RUN: is a directory; must be"),
    ("datasets --jsonl=RUN --out=RUN/x", "RUN: is a directory; must be a file of JSON lines"),
    ("datasets --jsonl== --out=RUN/x", "--jsonl==: must be SPLIT=FILE, or FILE"),
    (
        "datasets --catalogue=gsm8k --jsonl=RUN/math.jsonl --out=RUN/x",
        "math.jsonl, line 1: field 'answer' is '2', must have one '#### '",
    ),
    (f"train {TINY} --workdir=RUN/x --config.task.options.slip=x", "slip='x': must be a number"),
    ("train --config=RUN/ends.py", "ends.py, line 2: SystemExit"),
    ("train --config=RUN/dict.py", "get_config() must return a ConfigDict, not dict"),
    ("train --config=RUN/frozen.py", "get_config() must return a ConfigDict, not FrozenConfigDict"),
    ("train --config=RUN/bare.py", "must return a ConfigDict with fields, not an empty one"),
    ("train --config=RUN/key.py", "task.options.3: a key must be text"),
    ("train --config=RUN/needs.py", "what get_config() returns cannot be read"),
    ("list", "WHAT is missing", "presets|tasks"),
    ("list taskz", "WHAT=taskz: must be one of presets, tasks", "the nearest is 'tasks'"),
    ("list objective", "WHAT=objective: must be", "the nearest is 'objectives'"),
]


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("--config.objective.name=mhpo --config.objective.k_pos=3", {"objective.k_pos": 3}),
        ("--config.objective.name=mhpo --config.objective.k_pos 3", {"objective.k_pos": 3}),
        ("--config.objective.beta=.5 --config.objective.beta=.25", {"objective.beta": 0.25}),
        ("--config.objective.scale=inf", {"objective.scale": float("inf")}),
        ("--config.task.options.slip=.5", {"task.options.slip": 0.5}),
        ("--config.task.options={} --config.task.options.terms=3", {"task.options.terms": 3}),
        ("--config.task.options.directory=data/x", {"task.options.directory": "data/x"}),
        ("--config.task.options.levels={'a':1}", {"task.options.levels.a": 1}),
        (
            "--config.tokenizer.template_options.enable_thinking=False",
            {"tokenizer.template_options.enable_thinking": False},
        ),
    ],
)
def test_what_only_the_objective_or_the_task_knows_has_a_flag(line, fields, monkeypatch):
    """Fields that no config lists, of every objective and every task, one of your own too."""
    given = cli.Flags("train", "")
    given.config_file()
    argv = ["train", TINY, *line.split()]
    monkeypatch.setattr(sys, "argv", argv)
    found = cli.flat(given.parse(argv).config)
    assert {field: found[field] for field in fields} == fields


@pytest.mark.parametrize("case", WRONG, ids=[case[0][:60] for case in WRONG])
def test_what_is_wrong_is_one_line(sapo, tmp_path, case):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    line, *wanted = (text.replace("RUN", str(tmp_path)) for text in case)
    status, out, err = sapo(*line.split())
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: .*\n", err), err
    for text in wanted:
        assert text in err
    assert not (tmp_path / "x").exists()


def test_a_traceback_on_demand(sapo, tmp_path):
    _, _, err = sapo("export", f"--workdir={tmp_path}", "--out=x", "--verbosity=0")
    assert err.startswith("Traceback")
    assert "has no config.json" in err


def test_what_is_not_foreseen_keeps_its_traceback(sapo, tmp_path, monkeypatch):
    """Else a bug of the project would look like a mistake of the user."""
    monkeypatch.setattr(model.hf_config, "read", lambda *_: {}["key"])
    (tmp_path / "config.json").write_text("{}")
    _, _, err = sapo("evaluate", f"--hf={tmp_path}", "--task=chain_sum")
    assert "Traceback" in err
    assert "KeyError" in err


@pytest.mark.parametrize("error", [FileNotFoundError, IsADirectoryError, PermissionError], ids=str)
def test_what_the_system_refuses_names_the_file(error, sapo, tmp_path, monkeypatch):
    def read(path):
        raise error(0, "what the system says", str(path))

    monkeypatch.setattr(hf_json, "read", read)
    status, _, err = sapo("evaluate", f"--hf={tmp_path}", "--task=chain_sum")
    assert (status, err.count("\n")) == (1, 1)
    assert re.fullmatch(rf"error: {tmp_path}/config.json: (is|may) .*[a-z]\n", err)


def test_what_is_not_installed_names_its_extra(sapo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    arguments = "--config.task.name=reasoning_gym", "--config.task.options={'dataset': 'gcd'}"
    status, _, err = sapo("train", TINY, f"--workdir={tmp_path / 'run'}", *arguments)
    assert status == 1
    assert 'pip install "sapo_jax[tasks]"' in err


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.axes"])
def test_what_a_page_lacks_is_one_message(module, monkeypatch):
    """Whatever is looked for first, and at the end of training as in `report`."""
    for name in ("jinja2", "matplotlib", "sapo_jax.report.page"):
        monkeypatch.setitem(sys.modules, name, None)
    brings = 'not installed: jinja2, matplotlib; pip install "sapo_jax[plots]" brings them'
    assert cli.missing(ModuleNotFoundError("No module", name=module)) == brings
    monkeypatch.delitem(sys.modules, "sapo_jax.report.page")
    monkeypatch.delattr("sapo_jax.report.page", raising=False)
    again = "then python -m sapo_jax.report runs/a"
    assert report.no_page("runs/a") == f"no report yet: {brings}, {again}"


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("sap", ["sapo", "grpo"], "; the nearest is 'sapo'"),
        ("gpro", ["sapo", "grpo"], "; the nearest is 'grpo'"),
        ("missing", ["smollm2_sums", "base"], ""),
        ("objective.zzz", ["objective.tau", "objective.name"], ""),
        ("temperatures", ["quickstart", "sweeps/temperature"], "; the nearest is 'sweeps/temper"),
        (
            "learner.temperature",
            ["sampler.temperature", "learner.b1"],
            "; the nearest is 'sampler.",
        ),
        ("x", [], ""),
    ],
)
def test_only_names_that_are_near_are_named(name, names, found):
    assert cli.nearest(name, names).startswith(found)
    assert bool(found) == bool(cli.nearest(name, names))


def test_lists(sapo):
    """By name, everything that a config can name."""
    for what, names in {
        "presets": model.PRESETS, "tasks": tasks.TASKS, "objectives": OBJECTIVES,
        "configs": cli.shipped_configs(), "metrics": METRICS,
    }.items():  # fmt: skip
        status, out, _ = sapo("list", what)
        assert status == 0
        assert [line.split()[0] for line in out.splitlines()[1:]] == list(names)


def test_the_console_script_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sapo-jax"])
    console.main()
    out = capsys.readouterr().out
    assert re.findall(r"^  (\w+)", out, re.M) == list(cli.COMMANDS)


def test_flags_of_libraries_are_taken(sapo, tmp_path):
    """--logtostderr and the like went on the command line before, and in scripts."""
    status, out, _ = sapo("list", "tasks", "--logtostderr", "--verbosity=0")
    assert status == 0
    assert "chain_sum" in out


def test_two_commands_in_one_process():
    """Both have --workdir and --out, and tests import all of them."""
    from sapo_jax import evaluate, export, main

    assert "out" in evaluate.FLAGS
    assert "out" in export.FLAGS
    assert "out" not in main.FLAGS
    assert tiny_config.get_config().name == "tiny"


def test_the_config_of_one_command_is_none_of_another(monkeypatch):
    """absl shares parsers that are made without keywords."""
    first, second = cli.Flags("train", ""), cli.Flags("sweep", "")
    for given in (first, second):
        given.config_file()
    monkeypatch.setattr(sys, "argv", ["train", TINY])
    assert first.parse(sys.argv).config.name == "tiny"
    assert "--config.name='base'" in second.describe()
