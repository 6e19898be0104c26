"""Code of a user's own, from a file: found, held to its interface, the same in every process."""

import dataclasses
import pickle

import pytest

from sapo_jax import cli, objectives, rewards, tasks, train
from sapo_jax.objectives import presets
from sapo_jax.tasks import own
from sapo_jax.tasks.chain_sum import ChainSum
from sapo_jax.training import settings, workdir
from tests import tiny_config
from tests.training.test_metrics import check

MINE = """
import random, time
from dataclasses import dataclass
from sapo_jax.objectives import presets
from sapo_jax.tasks import own
from sapo_jax.tasks.chain_sum import ChainSum

COUNT = []

@dataclass(frozen=True)
class Sums(ChainSum):
    name = "sums"

class ByHash(Sums):
    def verify(self, example, completion):
        return float(hash(example.prompt) % 2)

class ByChance(Sums):
    def _generate(self, key):
        return super()._generate(key + str(random.random()))

class OneArgument(Sums):
    def verify(self, example):
        return 1.0

class Raises(Sums):
    def verify(self, example, completion):
        return float(completion[3] == "=")

class TooMuch(Sums):
    def verify(self, example, completion):
        return 2.0

class Letters(Sums):
    alphabet = "0123456789"

class Empty:
    pass

three = 3

def shorter(completion, answer):
    print("this is no answer")
    return -0.5 * len(completion)

def everything(prompt, completion, answer, example, finished, length):
    return len(prompt) + length + finished + (example.answer == answer)

def by_order(completion):
    return list({"some", "words", "in", "a", "set"}).index("words")

def by_clock(completion):
    return time.time() % 10 < 5

def by_calls(completion):
    COUNT.append(1)
    return len(COUNT)

def of_lists(prompts, completions):
    return [0.0]

def text(completion):
    return "good"

def nothing(completion):
    return None

def huge(completion):
    return 1e300

def digit(completion):
    return "1"

def infinite(completion):
    return float("inf")

def hangs(completion):
    time.sleep(1000)

def ends(completion):
    raise SystemExit

"""
OBJECTIVES = '''
import jax.numpy as jnp
from sapo_jax.objectives import Objective

def hinge(x, hp):
    beyond = jnp.maximum(jnp.abs(x.log_ratio) - hp["delta"], 0)
    return jnp.exp(-beyond / hp["delta"]) * x.advantages * x.logp

my_objective = Objective(hinge, "token", "seq_mean", {"delta": 0.2})

def by_order(x, hp):
    total = x.ratio
    for factor in {"1.5", "2.5", "3.5", "4.5", "5.5"}:
        total = total * float(factor)
    return total

def one_argument(x):
    return x.ratio

def scalar(x, hp):
    return jnp.sum(x.ratio * x.advantages)
'''  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Paths as a user writes them: from the folder of the file."""
    (tmp_path / "my.py").write_text(MINE)
    (tmp_path / "mine.py").write_text(OBJECTIVES)
    (tmp_path / "broken.py").write_text("x = 1\ny = x +\n")
    (tmp_path / "fails.py").write_text("x = 1\ny = 1 // 0\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG_TASKS = [
    (
        "ByHash",
        r"verify\(examples\('train'\)\[\d\], \w+\) is not the same in every process: .*hash",
    ),
    pytest.param(
        "ByChance",
        r"examples\('\w+'\) is not the same in every process: .*chance",
        marks=pytest.mark.slow,
    ),
    ("OneArgument", r"must have the method verify\(example, completion\)"),
    pytest.param("Raises", "verify.*raises IndexError", marks=pytest.mark.slow),
    ("Empty", "lacks name, alphabet, max_prompt_chars, max_completion_chars, examples, verify"),
    ("three", "is 3: must be the task's class"),
    ("Sum", "the nearest is my.py:Sums"),
    ("", "must name what my.py holds"),
    ("dataclase", "it has [A-Z]"),  # not the near `dataclass`, which it imports
]


@pytest.mark.parametrize(("name", "message"), WRONG_TASKS)
def test_tasks_that_break_their_promises_are_refused(mine, name, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(f"my.py:{name}")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Raises", IndexError, "out of range"),
        ("TooMuch", ValueError, r"verify must return a number in \[0, 1\], got 2.0"),
        ("Letters", ValueError, r"the alphabet lacks \['\+'"),
    ],
)
def test_what_a_process_finds_by_itself(mine, name, error, message):
    """Without the processes, of which one says the same."""
    with pytest.raises(error, match=message):
        [call() for call in own.probe(f"my.py:{name}", {}).values()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Sums", "there is no file nowhere.py"),
        ("broken.py:Sums", "broken.py, line 2: invalid syntax"),
        ("fails.py:Sums", "fails.py, line 2: ZeroDivisionError"),
        ("ends.py:Sums", "ends.py, line 1: SystemExit: 0"),
        ("binary.py:Sums", "binary.py: source code string cannot contain null bytes"),
        ("my.py:Sums", r"no option \['term'\]; it has terms, .*; the nearest is 'terms'"),
    ],
)
def test_files_that_are_not_there_or_fail_are_refused(mine, name, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(name, **({"term": 2} if name.startswith("my") else {}))


def test_a_task_of_a_file(mine):
    task = tasks.make("my.py:Sums", terms=3)
    example = task.examples("train")[5]
    assert example == ChainSum(terms=3).examples("train")[5]
    assert pickle.loads(pickle.dumps(task)) == task
    import cloudpickle  # what workers that read ahead get, which cannot import the file by a name

    assert b"ByHash" not in (text := cloudpickle.dumps(task))
    assert b"__dataclass_fields__" in text  # the class itself


WRONG_REWARDS = [
    ("by_order", "is not the same in every process"),
    pytest.param("by_clock", "is not the same in every process", marks=pytest.mark.slow),
    pytest.param("by_calls", "in every process: .*earlier calls", marks=pytest.mark.slow),
    ("of_lists", "takes prompts, completions: must take some of prompt, completion, answer"),
    pytest.param("text", "returned 'good' for .*must be a finite number", marks=pytest.mark.slow),
    ("hangs", "does not end within 3 s"),
    pytest.param("ends", "ends the process that calls it", marks=pytest.mark.slow),
    ("three", "is 3: must be a function"),
]


@pytest.mark.parametrize(("name", "message"), WRONG_REWARDS)
def test_rewards_that_break_their_promises_are_refused(mine, name, message, monkeypatch):
    if name == "hangs":
        monkeypatch.setattr(cli.own, "PATIENCE", 3.0)
    with pytest.raises(ValueError, match=rf"my.py:{name}'.*{message}"):
        rewards.Recipe(function=f"my.py:{name}")


def test_a_reward_takes_the_place_of_the_verdict(mine):
    task = tasks.make("chain_sum", terms=2)
    example = task.examples("train")[0]
    rows = rewards.rows_of([example] * 2, ["1", example.demonstration], [0, 0], [2, 9])
    recipe = rewards.Recipe(function="my.py:shorter", accuracy=2.0, repetition=0.5)
    parts = [rewards.judge(task, row, recipe) for row in rows]
    assert [p["accuracy"] for p in parts] == [0.0, 1.0]
    total_B, metrics = rewards.combine(parts, recipe)
    assert total_B.tolist() == [-1.0, -len(example.demonstration)]
    assert metrics["reward/accuracy"] == 0.5
    every = own._reward("my.py:everything")
    assert every(example, "1", True, 2) == len(example.prompt) + 4
    for name, value in (
        ("nothing", "None"),
        ("infinite", "inf"),
        ("huge", "1e.300"),
        ("digit", "'1'"),
    ):
        with pytest.raises(ValueError, match=rf"returned {value} for '1'.*must be a finite number"):
            own._reward(f"my.py:{name}")(example, "1", True, 2)
    with pytest.raises(ValueError, match=r"'shorter': must be a function of a file, my.py:name"):
        rewards.Recipe(function="shorter")


def test_objectives_of_a_file(mine):
    resolved = objectives.resolve("mine.py:my_objective", delta=0.5)
    assert resolved.hyperparameters == {"kl_coef": 0.0, "delta": 0.5}
    assert resolved.gate is objectives.resolve("mine.py:my_objective").gate  # compiled once
    with pytest.raises(ValueError, match=r"no hyperparameter 'delt'; .*the nearest is 'delta'"):
        objectives.resolve("mine.py:my_objective", delt=0.5)
    with pytest.raises(ValueError, match=r"the gate must take \(x, hp\)"):
        objectives.resolve("mine.py:one_argument")


def test_gates_that_break_their_promises_are_refused(mine):
    with pytest.raises(ValueError, match=r"its gate is not the same in every process"):
        objectives.resolve("mine.py:by_order")
    for name, message in (
        ("scalar", r"must return one value a token, f32\[2, 3\], not float32\[\]"),
        ("hinge", "the gate needs the hyperparameter 'delta': Objective"),
    ):
        with pytest.raises(ValueError, match=message):
            presets.probe(f"mine.py:{name}")["its gate"]()


def test_registered_names(monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))

    @tasks.register("sums")
    @dataclasses.dataclass(frozen=True)
    class Sums(ChainSum):
        pass

    assert tasks.make("sums", terms=3) == Sums(terms=3)
    for name in ("chain_sum", "a.b"):
        with pytest.raises(ValueError, match=rf"'{name}'.*must be a new name"):
            tasks.register(name, Sums)
    held = dict(objectives.OBJECTIVES)
    try:
        mine = objectives.register("mine", lambda x, hp: x.ratio * x.advantages)
        assert objectives.resolve("mine").gate is mine.gate
        with pytest.raises(ValueError, match=r"'sapo'.*must be a new name"):
            objectives.register("sapo", mine)
        with pytest.raises(ValueError, match=r"is 3: must be an objectives.Objective, or a gate"):
            objectives.register("three", 3)
    finally:
        objectives.OBJECTIVES.clear()
        objectives.OBJECTIVES.update(held)


def config(folder, **fields):
    c = tiny_config.get_config()
    with c.unlocked():
        fields = {"iterations": 1, "task.name": f"{folder}/my.py:Sums", **fields}
        c.update_from_flattened_dict(fields)
    return settings.from_config(c)


@pytest.mark.slow
def test_a_run_remembers_the_files(tmp_path, monkeypatch):
    """And does not go on where one of them has changed."""
    code, gate = tmp_path / "my.py", tmp_path / "mine.py"
    code.write_text(MINE)
    gate.write_text(OBJECTIVES)
    monkeypatch.setattr(train, "report", lambda _: None)
    fields = {"reward.function": f"{code}:shorter", "eval.every": 0}
    both = config(tmp_path, **fields, **{"objective.name": f"{gate}:my_objective"})
    assert dict(both.plain["files"]).keys() == {str(code), str(gate)}
    checked, run = config(tmp_path, **fields), tmp_path / "run"
    train.run(checked, run)
    (end,) = workdir.read_metrics(run)
    check(end, "", "source=rollout", "reward.function")
    assert end["reward/mean"] == pytest.approx(end["reward/function"], rel=1e-6)
    assert end["reward/function"] < -0.4
    assert settings.of_run(run).plain == checked.plain
    train.run(config(tmp_path, **fields), run)  # complete, and the files are the same
    code.write_text(MINE.replace("-0.5", "-0.25"))
    with pytest.raises(ValueError, match=r"my.py has changed: SHA-256 .* then, .* now"):
        train.run(config(tmp_path, **fields), run)


def test_fields_newer_than_a_run_have_their_defaults(tmp_path):
    """A directory of before goes on, or is exported, though it lacks fields of today.

    Nor has today a field that it has.
    """
    checked = config(tmp_path, **{"task.name": "chain_sum"})
    older = {key: dict(x) if isinstance(x, dict) else x for key, x in checked.plain.items()}
    del older["reward"]["function"], older["population"]
    older["sampler"]["shrink"] = 2
    workdir.write_config(tmp_path, older)
    workdir.check_config(tmp_path, checked.plain, may_differ=checked.may_differ)
    assert settings.of_run(tmp_path).plain == checked.plain
    other = checked.plain | {"population": {"method": "vmap"}}
    with pytest.raises(ValueError, match=r"population.method: stored 'auto', given 'vmap'"):
        workdir.check_config(tmp_path, other, may_differ=checked.may_differ)
