"""Pass@k against enumeration; bootstrap intervals that cover."""

import itertools

import numpy as np
import pytest

from sapo_jax import evaluate, rewards, tasks
from sapo_jax.data import encode
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.tasks import own
from sapo_jax.training import evaluation
from sapo_jax.types import LENGTH, STOP


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    """Keeping the last sample's verdict, or 1 − (1 − p)^k, is biased."""
    for correct in range(6):
        verdicts = [True] * correct + [False] * (5 - correct)
        exact = np.mean([any(chosen) for chosen in itertools.combinations(verdicts, k)])
        assert evaluation.pass_at_k(np.array([correct]), 5, k)[0] == pytest.approx(exact, abs=1e-12)


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.4"):
        evaluation.pass_at_k(np.array([1]), 4, 5)


def test_intervals_cover_the_truth(rng):
    """Resampling samples instead of prompts would give intervals that are far too narrow."""
    covered = 0
    for _ in range(200):
        skill = rng.beta(0.5, 0.5, 60)
        verdicts = rng.uniform(size=(60, 8)) < skill[:, None]
        metrics = evaluation.summarise(verdicts)
        covered += metrics["eval/pass_at_1_low"] <= 0.5 <= metrics["eval/pass_at_1_high"]
        assert metrics["eval/pass_at_1"] == pytest.approx(verdicts.mean())
        assert metrics["eval/pass_at_8"] == pytest.approx(verdicts.any(-1).mean())
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (5, 20, 0.1119, 0.4687), (1, 1, 0.2065, 1.0)],
)
def test_intervals_of_one_sample_are_wilsons(correct, total, low, high):
    """Resampling 20 failures says that nothing but 0 can be; values by Wilson's formula."""
    metrics = evaluation.summarise(np.arange(total)[:, None] < correct)
    found = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    assert found == pytest.approx((low, high), abs=1e-4)
    line = evaluate._line("sums", metrics | {"eval/prompts": total, "eval/length_mean": 3}, 1)
    assert line.count("Pass@1 ") == 1
    assert f"1 sample of {total} prompt{'s' * (total > 1)})" in line


def test_evaluation_counts_every_prompt_once(monkeypatch):
    """The last batch is filled up with repeats, which must not be counted."""
    monkeypatch.setattr(own, "reward", lambda _: lambda example, text, finished, length: -length)
    task = tasks.make("chain_sum", terms=2)
    tokenizer = CharTokenizer(task.alphabet)
    examples = encode.held_out(task.examples("test"), 7)
    wrong, cut = examples[2].prompt, examples[5].prompt

    def sample(prompts, on_groups):
        texts = [
            tokenizer.decode(row[:n]) for row, n in zip(prompts.tokens, prompts.length, strict=True)
        ]
        tokens = np.zeros((8, 30), np.int32)
        mask = np.zeros((8, 30), bool)
        finished = np.full(8, STOP)
        for i in range(8):
            answer = next(e.answer for e in examples if e.prompt == texts[i // 2])
            ids = tokenizer.encode("=" + ("0" + answer if texts[i // 2] == wrong else answer))
            tokens[i, : len(ids) + 1] = [*ids, 1]
            mask[i, : len(ids) + 1] = True
            finished[i] = LENGTH if texts[i // 2] == cut else STOP
        index = np.array([2, 0, 3, 1])  # in any order
        by_group = (x.reshape(4, 2, *x.shape[1:])[index] for x in (tokens, mask.sum(-1), finished))
        on_groups[0](index, *by_group)
        return [mask.sum(-1)]

    with rewards.Scorer(task, rewards.Recipe(function="my.py:brief")) as scorer:
        (metrics,) = evaluation.evaluate(
            sample, scorer, examples, tokenizer, samples=2, width=task.max_prompt_chars, batch=4
        )
    assert metrics["eval/pass_at_1"] == pytest.approx(5 / 7)
    assert metrics["eval/reward_function"] == -metrics["eval/length_mean"]


def test_tasks_of_the_command_line():
    text = 'reasoning_gym,dataset=gcd,level=2,options={"a": 1, "b": 2},train=a=b.jsonl'
    options = {"dataset": "gcd", "level": 2, "options": {"a": 1, "b": 2}, "train": "a=b.jsonl"}
    assert evaluate.parse_task(text) == ("reasoning_gym", options)
    with pytest.raises(ValueError, match="'terms' must be option=value"):
        evaluate.parse_task("chain_sum,terms")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"terms": 2, "levels": [1, 2], "path": "a=b.jsonl", "flag": "true", "none": None, "e": ""},
    ],
)
def test_tasks_as_text(options):
    assert evaluate.parse_task(evaluate.task_text("x", options)) == ("x", options)
    with pytest.raises(ValueError, match="cannot say"):
        evaluate.task_text("x", {"a": "b,c=d"})


@pytest.mark.parametrize(
    "text", ["enable_thinking=False,level='a'", "{'enable_thinking': False, 'level': 'a'}"]
)
def test_options_of_the_template(text):
    assert evaluate.parse_template_options(text) == {"enable_thinking": False, "level": "a"}
    assert evaluate.parse_template_options("") == {}


@pytest.mark.parametrize("text", ["enable_thinking", "thinking=false", '{"thinking": false}'])
def test_options_that_would_not_be_what_they_seem(text):
    with pytest.raises(
        ValueError, match=r"--template_options: .*must be (option=value|written as)"
    ):
        evaluate.parse_template_options(text)
