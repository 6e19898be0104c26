"""Policies out of a run and into the next: Hugging Face directories all the way."""

import json
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sapo_jax import evaluate, export, learner, model, train
from sapo_jax.data import hf_tokenizer
from sapo_jax.model import params
from sapo_jax.training import checkpoint, settings
from sapo_jax.training.workdir import read_metrics
from tests import tiny_config
from tests.training.test_metrics import check

pytestmark = pytest.mark.usefixtures("no_plots")

OWN = """
from sapo_jax.tasks.chain_sum import ChainSum

class Doubled(ChainSum):
    name = "doubled"

    def verify(self, example, completion):
        return super().verify(example, completion)
"""


def settings_of(**fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return settings.from_config(config)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two iterations from random parameters, and its policy as a directory."""
    root = tmp_path_factory.mktemp("export")
    checked = settings_of(iterations=2)
    train.run(checked, root / "run")
    export.export(root / "run", root / "policy")
    return checked, root


def start_from(policy, **fields):
    checked = settings_of()
    return {
        "init_from": str(policy),
        "model.preset": str(policy),
        "tokenizer.directory": str(policy),
        "tokenizer.chat": False,
        "data.max_prompt_tokens": checked.width,
        "sampler.max_new_tokens": checked.max_new_tokens,
        **fields,
    }


def final_params(workdir, checked):
    abstract = params.abstract(checked.model)
    return jax.device_get(checkpoint.restore_params(workdir / "checkpoints", abstract))


def test_the_directory_holds_the_policy(first):
    checked, root = first
    config, weights = model.hf.load(root / "policy")
    jax.tree.map(np.testing.assert_array_equal, weights, final_params(root / "run", checked))
    assert config.rope_theta == 100.0
    tokenizer = hf_tokenizer.load(root / "policy", vocab_size=config.vocab_size)
    text = checked.tokenizer.alphabet * 2
    assert tokenizer.encode(text) == checked.tokenizer.encode(text)
    assert tokenizer.decode([*tokenizer.encode(text), 1, 0]) == text
    assert (tokenizer.pad_id, tokenizer.stop_ids) == (0, (1,))


def test_the_command_that_is_printed_works(first, tmp_path):
    """The run's own task; its tokenizer, of characters, has no chat template."""
    _, root = first
    command = shlex.split(export.evaluation(root / "run", tmp_path / "a policy"))
    assert command[:3] == ["python", "-m", "sapo_jax.evaluate"]
    rooms = ["--max_prompt_tokens=4", "--max_new_tokens=6", "--chat=False"]
    task = "chain_sum,modulus=10,terms=2"
    assert command[3:] == [f"--hf={tmp_path}/a policy", f"--task={task}", *rooms]
    assert evaluate.FLAGS.parse(["evaluate", *command[3:]]).chat is False
    assert evaluate.parse_task(task) == ("chain_sum", {"terms": 2, "modulus": 10})


def test_a_run_goes_on_from_the_directory(first, tmp_path):
    """It starts where the other ended, can be interrupted, and hands its policy back."""
    _, root = first
    whole = settings_of(**start_from(root / "policy", iterations=2, **{"checkpoint.every": 1}))
    train.run(whole, tmp_path / "whole")
    before, after = read_metrics(root / "run"), read_metrics(tmp_path / "whole")
    assert after[0]["eval/pass_at_1"] == before[-1]["eval/pass_at_1"]
    assert after[0]["eval/length_mean"] == before[-1]["eval/length_mean"]
    part = settings_of(**start_from(root / "policy", iterations=1, **{"checkpoint.every": 1}))
    train.run(part, tmp_path / "part")
    train.run(whole, tmp_path / "part")
    states = []
    for name in ("whole", "part"):
        wanted = jax.eval_shape(learner.init, params.abstract(whole.model), whole.hp)
        with checkpoint.Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(jax.device_get(checkpoints.restore(2, wanted)))
    jax.tree.map(np.testing.assert_array_equal, *states)
    export.export(tmp_path / "whole", tmp_path / "policy")
    _, weights = model.hf.load(tmp_path / "policy")
    jax.tree.map(np.testing.assert_array_equal, weights, states[0][0].params)
    assert hf_tokenizer.load(tmp_path / "policy").stop_ids == (1,)


@pytest.mark.slow
def test_a_directory_is_evaluated_from_the_command_line(first, tmp_path):
    _, root = first
    out, policy = tmp_path / "found.json", tmp_path / "policy"
    shutil.copytree(root / "policy", policy)
    asked = "{{ messages[0].content if level == 2 and plain else raise_exception('no options') }}"
    (policy / "chat_template.jinja").write_text(asked)
    task = "chain_sum,terms=2,modulus=10"
    command = [
        sys.executable, "-m", "sapo_jax.evaluate", f"--hf={policy}", f"--task={task}",
        "--template_options=plain=True,level=2", "--prompts=6", "--batch=4", "--samples=3",
        "--max_prompt_tokens=8", "--max_new_tokens=5", "--compilation_cache=.cache/tests",
        f"--out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["sets"][task]
    check(found, "an evaluation", "sapo_jax.evaluate", samples=3)
    assert found["eval/prompts"] == 6
    assert 0 <= found["eval/pass_at_1_low"] <= found["eval/pass_at_1"] <= 1
    assert found["eval/pass_at_1"] <= found["eval/pass_at_3"]
    assert json.loads(out.read_text())["settings"]["template_options"] == "plain=True,level=2"
    assert f"Pass@1 {found['eval/pass_at_1']:.4f} (95% interval" in done.stdout
    command[4] = "--task=chain_sum,terms"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'terms' must be option=value" in done.stderr


def evaluated(out, *arguments):
    """What the command writes, in this process."""
    common = [f"--out={out}", "--compilation_cache="]
    evaluate.main(evaluate.FLAGS.parse(["evaluate", *arguments, *common]))
    return json.loads(out.read_text())


def test_a_run_is_evaluated_without_an_export(first, tmp_path):
    """By its own tasks and numbers it gets what it recorded itself; others can be given."""
    checked, root = first
    own = evaluated(tmp_path / "own.json", f"--workdir={root / 'run'}")
    assert own["settings"]["max_new_tokens"] == checked.max_new_tokens
    last = read_metrics(root / "run")[-1]
    (found,) = own["sets"].values()
    assert found.pop("eval/prompts") == checked.config.eval.prompts
    assert found == {key: last[key] for key in found}
    (tmp_path / "my.py").write_text(OWN)
    other = evaluated(
        tmp_path / "other.json", f"--workdir={root / 'run'}", "--prompts=4", "--samples=2",
        f"--task={tmp_path}/my.py:Doubled", "--task=chain_sum,terms=2",
    )  # fmt: skip
    assert [each["eval/prompts"] for each in other["sets"].values()] == [4, 4]
    assert "eval/pass_at_2" in other["sets"]["chain_sum,terms=2"]


def test_what_says_a_policy_twice_or_never_is_refused(first, tmp_path):
    _, root = first
    for arguments, message in (
        (["--task=chain_sum"], "--hf is missing, or --workdir of a run"),
        ([f"--workdir={root / 'run'}", f"--hf={root}"], "--hf must not stand beside --workdir"),
        ([f"--workdir={root / 'run'}", "--nochat"], "--chat must not stand beside --workdir"),
        ([f"--workdir={tmp_path}"], "has no config.json: name the --workdir of a run"),
        (
            [f"--workdir={root / 'run'}", "--task=chain_sum", "--task=maze,cells=3"],
            "--task=maze,cells=3: has images: must be of text alone, .*model_type='qwen3' sees",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(tmp_path / "out.json", *arguments)


REFUSED = [
    ({"model.preset": "nano"}, r"model.preset='nano': must be .*policy' too"),
    ({"model.hidden_size": 64}, r"model.hidden_size=64: must be None"),
    ({"init_from": "", "model.preset": "models/none"}, r"models/none'.*Hugging Face directory"),
    ({"tokenizer.directory": ""}, r"config.model.preset: the tokenizer does not match"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_does_not_belong_together_is_refused(first, fields, message):
    _, root = first
    given = start_from(root / "policy", **fields)
    if not given["tokenizer.directory"]:  # an alphabet of 256 characters more than the policy has
        given["task.name"], given["task.options"] = "reasoning_gym", {"dataset": "gcd"}
    with pytest.raises(ValueError, match=message):
        settings_of(**given)


def test_what_is_no_run_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json: name the --workdir"):
        export.export(tmp_path, tmp_path / "out")
