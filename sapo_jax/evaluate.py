"""Pass@1 and Pass@k on a fixed held-out set, with bootstrap intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sapo_jax import data, rewards
from sapo_jax.tasks.base import Example, Task
from sapo_jax.tokenizer import Tokenizer
from sapo_jax.types import Prompts, Rollout

RESAMPLES = 2000


def pass_at_k(correct_P: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased Pass@k of each prompt: 1 − C(n − c, k) / C(n, k).

    Source: arXiv 2107.03374, Eq. 1.

    Args:
      correct_P: i[P], correct completions c among the samples.
      samples: n per prompt.
      k: in 1..n.

    Returns:
      f64[P]; for k = 1 the share of correct completions.

    Raises:
      ValueError: k is not in 1..n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must be in 1..{samples}, the samples of a prompt")
    total = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(c), k) / total for c in correct_P])


def interval(values_P: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (Efron 1979), with a fixed seed."""
    draws = np.random.default_rng(0).integers(0, len(values_P), (RESAMPLES, len(values_P)))
    means = values_P[draws].mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(correct_PN: np.ndarray) -> dict[str, float]:
    """Metrics of a table of verdicts, bool[P, n]: Pass@1 as the mean over samples, and Pass@n."""
    samples = correct_PN.shape[1]
    metrics = {}
    for k in sorted({1, samples}):
        values_P = pass_at_k(correct_PN.sum(-1), samples, k)
        low, high = interval(values_P)
        metrics |= {
            f"eval/pass_at_{k}": float(values_P.mean()),
            f"eval/pass_at_{k}_low": low,
            f"eval/pass_at_{k}_high": high,
        }
    return metrics


def evaluate(
    sample: Callable[[Prompts], Rollout],
    task: Task,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    samples: int,
    width: int,
    batch: int,
    names: Sequence[str] = (),
    recipe: rewards.Recipe | None = None,
) -> dict[str, float]:
    """Metrics of a policy on held-out examples.

    Args:
      sample: draws ``samples`` completions of each of ``batch`` prompts.
      task: judges; a completion counts as correct where its score is 1.
      examples: the evaluation set; the last batch is filled up with its own examples.
      tokenizer: of the policy.
      samples: completions per prompt.
      width: tokens of room for a prompt.
      batch: prompts sampled at a time.
      names: of the tasks that ``Example.task`` counts, for metrics of each of them.
      recipe: says which part of a completion is judged; its weights do not matter.

    Returns:
      ``eval/pass_at_1``, ``eval/pass_at_<samples>``, each with ``_low`` and ``_high``, and
      ``eval/length_mean``; with names, ``eval/<name>/pass_at_1`` and so on too.
    """
    verdicts, lengths = [], []
    for start in range(0, len(examples), batch):
        real = list(examples[start : start + batch])
        filled = (real * batch)[:batch]
        rows = sample(data.encode_prompts(filled, tokenizer, width))
        tokens, mask, finished = (np.asarray(x) for x in (rows.tokens, rows.mask, rows.finished))
        texts = rewards.completion_texts(tokens, mask, tokenizer)
        repeated = [e for e in filled for _ in range(samples)]
        scores_B = rewards.score(task, repeated, texts, finished, recipe=recipe)
        scores_PN = scores_B.reshape(batch, samples)
        verdicts.append(scores_PN[: len(real)] == 1)
        lengths.append(mask.sum(-1).reshape(batch, samples)[: len(real)])
    correct_PN = np.concatenate(verdicts)
    metrics = summarise(correct_PN)
    task_P = np.array([example.task for example in examples])
    for k, name in enumerate(names):
        if (task_P == k).any():
            own = summarise(correct_PN[task_P == k])
            metrics |= {key.replace("eval/", f"eval/{name}/"): x for key, x in own.items()}
    return metrics | {"eval/length_mean": float(np.concatenate(lengths).mean())}
