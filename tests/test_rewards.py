"""Rewards: which tokens are judged, and which rows get nothing."""

from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest

from sapo_jax import types
from sapo_jax.rewards import (
    Recipe,
    Row,
    Scorer,
    combine,
    completion_texts,
    judge,
    overlong,
    repetition,
    rows_of,
    score,
)
from sapo_jax.tasks import make
from sapo_jax.tasks.base import make_example
from sapo_jax.tokenizer import CharTokenizer


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A task with one verdict for everything."""

    verdict: float
    name: str = "fixed"

    def verify(self, example, completion):
        return self.verdict


def rollout_row(tokenizer, prompt, completion, width):
    """A left-aligned row as the sampler lays it out, and its mask."""
    start = tokenizer.encode(prompt)
    rest = [*tokenizer.encode(completion), tokenizer.stop_ids[0]]
    tokens = np.full(width, tokenizer.pad_id, np.int32)
    tokens[: len(start) + len(rest)] = start + rest
    mask = np.zeros(width, bool)
    mask[len(start) : len(start) + len(rest)] = True
    return tokens, mask


def task_rows(count=6):
    task = make("chain_sum")
    tokenizer = CharTokenizer(task.alphabet)
    examples = [task.examples("train")[i] for i in range(count)]
    width = task.max_prompt_chars + task.max_completion_chars + 1
    rows = [rollout_row(tokenizer, e.prompt, e.demonstration, width) for e in examples]
    tokens_BS, mask_BS = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    return task, tokenizer, examples, tokens_BS, mask_BS


def test_completion_texts_hold_the_completion_without_prompt_stop_and_pads():
    """With a part of the prompt or a pad in the text, every strict verifier says 0."""
    _, tokenizer, examples, tokens_BS, mask_BS = task_rows()
    texts = completion_texts(tokens_BS, mask_BS, tokenizer)
    assert texts == [example.demonstration for example in examples]


def test_completion_texts_skip_holes_and_empty_rows():
    tokenizer = CharTokenizer("abc")
    tokens_BS = np.array([[2, 3, 4, 1], [2, 3, 4, 1]])
    mask_BS = np.array([[True, False, True, True], [False] * 4])
    assert completion_texts(tokens_BS, mask_BS, tokenizer) == ["ac", ""]


def test_what_lies_outside_the_mask_does_not_matter():
    _, tokenizer, _, tokens_BS, mask_BS = task_rows()
    garbage_BS = np.where(mask_BS, tokens_BS, -7)
    assert completion_texts(garbage_BS, mask_BS, tokenizer) == completion_texts(
        tokens_BS, mask_BS, tokenizer
    )


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3,))])
def test_completion_texts_refuse_other_shapes(shapes):
    """A mask that broadcasts would decode the wrong tokens."""
    tokens, mask = np.zeros(shapes[0], np.int32), np.ones(shapes[1], bool)
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        completion_texts(tokens, mask, CharTokenizer("ab"))


def test_each_row_is_judged_against_its_own_example():
    task, tokenizer, examples, tokens_BS, mask_BS = task_rows()
    texts = completion_texts(tokens_BS, mask_BS, tokenizer)
    finished_B = np.full(len(texts), types.STOP)
    rewards_B = score(task, examples, texts, finished_B)
    assert rewards_B.dtype == np.float32
    np.testing.assert_array_equal(rewards_B, np.ones(len(texts)))
    texts[2] += "0"
    texts[4] = ""
    np.testing.assert_array_equal(score(task, examples, texts, finished_B), [1, 1, 0, 1, 0, 1])


def test_rows_cut_at_the_length_limit_get_zero_even_when_their_text_is_right():
    """A policy that never stops must not be paid for a prefix that happens to be right."""
    task, tokenizer, examples, tokens_BS, mask_BS = task_rows(4)
    texts = completion_texts(tokens_BS, mask_BS, tokenizer)
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
    task, tokenizer, examples, tokens_BS, mask_BS = task_rows(4)
    texts = completion_texts(tokens_BS, mask_BS, tokenizer)
    texts[1] = ""
    finished_B = np.array([types.STOP, types.STOP, types.LENGTH, types.STOP])
    rows = rows_of(examples, texts, finished_B, mask_BS.sum(-1))
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
        futures = [scorer.submit(rows[:6]), scorer.submit(rows[6:])]
        totals = [future.result()[0] for future in futures]
    np.testing.assert_array_equal(np.concatenate(totals), [float(i % 3 > 0) for i in range(12)])


def test_a_scorer_reports_errors_and_goes_on():
    with Scorer(Fixed(2.0), workers=2) as scorer:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"'fixed'.*row 0"):
                scorer.submit([row()]).result()
        total_B, metrics = scorer.submit([]).result()
        assert total_B.shape == (0,)
        assert metrics == {"reward/accuracy": 0.0}
