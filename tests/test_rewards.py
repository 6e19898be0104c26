"""Rewards: which tokens are judged, and which rows get nothing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sapo_jax import types
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.rewards import (
    Groups,
    Recipe,
    Row,
    Scorer,
    combine,
    judge,
    overlong,
    repetition,
    rows_of,
)
from sapo_jax.tasks import make
from sapo_jax.tasks.base import make_example


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A task with one verdict for everything."""

    verdict: float
    name: str = "fixed"

    def verify(self, example, completion):
        return self.verdict


def score(task, examples, completions, finished_B):
    """Rewards of completions by the default recipe."""
    rows = rows_of(examples, completions, finished_B, np.zeros(len(examples), np.int32))
    return combine([judge(task, row, Recipe(), i) for i, row in enumerate(rows)], Recipe())[0]


def finished_groups(tokenizer, completions, width):
    """The arrays of groups of one row, as the sampler reports them, garbage behind the stop."""
    ids = [[*tokenizer.encode(text), tokenizer.stop_ids[0]] for text in completions]
    tokens_g1T = np.full((len(ids), 1, width), 3, np.int32)
    for row_, tokens_T in zip(ids, tokens_g1T[:, 0], strict=True):
        tokens_T[: len(row_)] = row_
    count_g1 = np.array([[len(row_)] for row_ in ids])
    return tokens_g1T, count_g1, np.full_like(count_g1, types.STOP)


def task_rows(count=6):
    task = make("chain_sum")
    examples = [task.examples("train")[i] for i in range(count)]
    return task, CharTokenizer(task.alphabet), examples, [e.demonstration for e in examples]


def test_groups_hold_completions_without_stop_and_what_lies_behind_it():
    """With a part of the prompt or a pad in the text, every strict verifier says 0."""
    task, tokenizer, examples, texts = task_rows()
    width = 3 + task.max_completion_chars
    order = np.array([3, 0, 5, 4, 1, 2])
    arrays = finished_groups(tokenizer, [texts[i] for i in order], width)
    with Scorer(task) as scorer:
        groups = Groups(scorer, examples, tokenizer)
        groups(order[:4], *(x[:4] for x in arrays))
        groups(order[4:], *(x[4:] for x in arrays))
        verdicts = groups.wait()
    assert groups.texts(1) == texts
    assert [v.parts["accuracy"] for v in verdicts] == [1.0] * 6
    assert all(v.seconds > 0 for v in verdicts)


def test_each_row_is_judged_against_its_own_example():
    task, _, examples, texts = task_rows()
    finished_B = np.full(len(texts), types.STOP)
    rewards_B = score(task, examples, texts, finished_B)
    assert rewards_B.dtype == np.float32
    np.testing.assert_array_equal(rewards_B, np.ones(len(texts)))
    texts[2] += "0"
    texts[4] = ""
    np.testing.assert_array_equal(score(task, examples, texts, finished_B), [1, 1, 0, 1, 0, 1])


def test_rows_cut_at_the_length_limit_get_zero_even_when_their_text_is_right():
    """A policy that never stops must not be paid for a prefix that happens to be right."""
    task, _, examples, texts = task_rows(4)
    finished_B = np.array([types.STOP, types.LENGTH, types.LENGTH, types.STOP])
    np.testing.assert_array_equal(score(task, examples, texts, finished_B), [1, 0, 0, 1])


def test_partial_scores_pass_through():
    examples = task_rows(2)[2]
    rewards_B = score(Fixed(0.25), examples, ["", ""], np.array([types.STOP, types.LENGTH]))
    np.testing.assert_array_equal(rewards_B, np.float32([0.25, 0]))


@pytest.mark.parametrize("verdict", [math.nan, math.inf, -math.inf, -0.01, 1.01])
def test_verdicts_that_are_no_score_raise_naming_the_task(verdict):
    """One NaN reward makes the advantages of its whole group NaN."""
    examples = task_rows(1)[2]
    with pytest.raises(ValueError, match=r"'fixed'.*row 0"):
        score(Fixed(verdict), examples, [""], np.array([types.STOP]))


def test_lengths_that_differ_are_refused():
    examples = task_rows(2)[2]
    stop_B = np.full(2, types.STOP)
    for completions, finished_B in ((["a"], stop_B), (["a", "b"], stop_B[:1])):
        with pytest.raises(ValueError, match="one entry per row"):
            score(Fixed(1.0), examples, completions, finished_B)


def test_an_empty_batch_has_no_rewards():
    rewards_B = score(Fixed(1.0), [], [], np.zeros(0, np.int32))
    assert rewards_B.shape == (0,)
    assert rewards_B.dtype == np.float32


def row(completion="", finished=types.STOP, length=0, example=None):
    return Row(example or make_example("q", "a", ""), completion, finished, length)


@dataclasses.dataclass(frozen=True)
class Echo:
    """Right iff the judged text is the answer; waits at a barrier first, if there is one."""

    barrier: threading.Barrier | None = None
    name: str = "echo"

    def verify(self, example, completion):
        if self.barrier:
            self.barrier.wait()
        return float(completion == example.answer)


def test_the_default_recipe_is_the_verdict_alone():
    task, _, examples, texts = task_rows(4)
    texts[1] = ""
    finished_B = np.array([types.STOP, types.STOP, types.LENGTH, types.STOP])
    rows = rows_of(examples, texts, finished_B, np.arange(4))
    total_B, metrics = combine([judge(task, r, Recipe()) for r in rows], Recipe())
    np.testing.assert_array_equal(total_B, score(task, examples, texts, finished_B))
    assert metrics == {"reward/accuracy": 0.5}


@pytest.mark.parametrize(
    ("completion", "opened", "expected"),
    [
        ("<think>so</think>a", False, (1, 1)),
        (" <think>\nso\n</think>\n\na\n", False, (1, 1)),
        ("so</think>a", True, (1, 1)),
        ("<think>so</think>b", False, (0, 1)),
        ("<think>a</think>", False, (0, 0)),
        ("<think></think>a", False, (1, 1)),
        ("a", False, (0, 0)),
        ("so</think>a", False, (0, 0)),
        ("<think>so</think>a", True, (0, 0)),
        ("<think>so<think></think>a", False, (0, 0)),
        ("<think>so</think></think>a", False, (0, 0)),
        ("<think>so</think>a<think>", False, (0, 0)),
        ("x<think>so</think>a", False, (0, 0)),
        ("</think><think>a", False, (0, 0)),
        ("<think>a", False, (0, 0)),
        ("<THINK>so</THINK>a", False, (0, 0)),
        ("", False, (0, 0)),
    ],
)
def test_thoughts_and_answers(completion, opened, expected):
    """The answer is what follows the thought: an answer inside the thought is not one."""
    recipe = Recipe(format=0.5, think=True, opened=opened)
    parts = judge(Echo(), row(completion), recipe)
    assert (parts["accuracy"], parts["format"]) == expected
    cut = judge(Echo(), row(completion, types.LENGTH), recipe)
    assert (cut["accuracy"], cut["format"]) == (0, 0)


def test_overlong_is_soft():
    """R += min(0, -(|y| - (L_max - B)) / B · p): 0 up to L_max - B, -p at L_max."""
    found = [overlong(n, 100, 20) for n in (0, 79, 80, 81, 90, 100, 120)]
    np.testing.assert_allclose(found, [0, 0, 0, -0.05, -0.5, -1, -1])
    recipe = Recipe(overlong=0.5, max_length=100, buffer=20)
    total_B, metrics = combine([judge(Echo(), row("a", length=90), recipe)], recipe)
    np.testing.assert_allclose(total_B, [0.75])
    assert metrics == {"reward/accuracy": 1.0, "reward/overlong": -0.5}


def test_repetition_counts_repeated_ngrams():
    assert repetition("a b c d e f", 2) == 0
    assert repetition("a " * 101, 2) == pytest.approx(-0.99)
    assert repetition("a b a b", 2) == pytest.approx(-1 / 3)
    for text in ("", "a", "a b"):
        assert repetition(text, 2) == 0


def test_recipes_out_of_range_name_the_field():
    for fields, message in (
        ({"format": -1}, r"reward\.format"),
        ({"accuracy": math.nan}, r"reward\.accuracy"),
        ({"overlong": 1}, r"reward\.buffer=0"),
        ({"overlong": 1, "buffer": 9, "max_length": 8}, r"reward\.max_length=8"),
        ({"ngram": 0}, r"reward\.ngram"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**fields)


def test_a_scorer_keeps_the_order_and_judges_rows_at_the_same_time():
    """No row passes the barrier until all twelve are there: submit() must not wait for any."""
    rows = [row("a" if i % 3 else "b") for i in range(12)]
    with Scorer(Echo(threading.Barrier(12, timeout=30)), workers=12) as scorer:
        futures = scorer.submit(rows[:6]) + scorer.submit(rows[6:])
        verdicts = [future.result().parts["accuracy"] for future in futures]
    assert verdicts == [float(i % 3 > 0) for i in range(12)]


def test_a_scorer_reports_errors_and_goes_on():
    with Scorer(Fixed(2.0), workers=2) as scorer:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"'fixed'.*row 0"):
                scorer.submit([row()])[0].result()
    with pytest.raises(ValueError, match="workers=0"):
        Scorer(Fixed(1.0), workers=0)


STUCK = """
import dataclasses, time
import numpy as np
from sapo_jax import rewards, types
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.tasks.base import make_example
rewards.PATIENCE = 0.5

@dataclasses.dataclass(frozen=True)
class Stuck:
    name = "stuck"
    def verify(self, example, completion):
        if completion == "1":
            time.sleep(0.2)
            raise ValueError("broken verifier")
        while True:
            {hang}

def groups(scorer, text):
    tokenizer = CharTokenizer("01")
    found = rewards.Groups(scorer, [make_example("0", "0", "")], tokenizer)
    ids = np.array([[[*tokenizer.encode(text), tokenizer.stop_ids[0]]]])
    found(np.array([0]), ids, np.array([[2]]), np.array([[types.STOP]]))
    return found

with rewards.Scorer(Stuck(), workers=2) as scorer:
    [g.wait() for g in [groups(scorer, text) for text in {texts!r}]]
"""


@dataclasses.dataclass(frozen=True)
class Leaves:
    name = "leaves"

    def verify(self, example, completion):
        raise SystemExit(0)


def test_a_verifier_that_leaves_does_not_end_the_run_in_silence():
    row = Row(make_example("0", "0", ""), "1", types.STOP, 2)
    error = pytest.raises(RuntimeError, match="'leaves': judging '1' raises SystemExit: 0")
    with Scorer(Leaves()) as scorer, error:
        scorer.submit([row])[0].result()


@pytest.mark.parametrize(
    ("hang", "texts"), [("time.sleep(9)", "01"), ("pass", "10"), ("time.sleep(9)", "0100")]
)
def test_an_error_ends_a_process_whatever_hangs(hang, texts):
    """Nothing waits for the verdict that never comes: not the loop, nor the scorer's end, nor
    Python's, which joins the threads of an executor."""
    code = STUCK.format(hang=hang, texts=texts)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 1
    assert "ValueError: broken verifier" in found.stderr
    assert "verdicts, the first of '0', and is not waited for" in found.stderr


def test_what_is_waited_for_is_told(monkeypatch, caplog):
    monkeypatch.setattr("sapo_jax.rewards.NOTICE", 0.1)
    go = threading.Barrier(2, timeout=30)
    with Scorer(Echo(go)) as scorer:
        futures = scorer.submit([row("a")])
        threading.Timer(2.5, go.wait).start()
        scorer.wait(futures)
    assert futures[0].result().parts["accuracy"] == 1.0
    assert "Task 'echo' computes 1 verdicts, the first of 'a', since" in caplog.text


def test_a_scorer_that_ends_early_cancels_what_has_not_begun():
    go = threading.Barrier(2, timeout=30)
    with Scorer(Echo(go)) as scorer:
        futures = scorer.submit([row("b")] * 4)
        threading.Timer(0.5, go.wait).start()
        while not futures[0].running():
            time.sleep(0.001)
    assert futures[0].result().parts["accuracy"] == 0.0
    assert all(future.cancelled() for future in futures[1:])
