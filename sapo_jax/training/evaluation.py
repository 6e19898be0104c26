"""Pass@1 and Pass@k on fixed held-out sets, with bootstrap intervals over prompts."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from sapo_jax import rewards, sampler
from sapo_jax.data import encode
from sapo_jax.data import stream as streams
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example
from sapo_jax.training import bootstrap
from sapo_jax.training.experience import sample
from sapo_jax.training.settings import Settings
from sapo_jax.types import Rollout


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


def summarise(correct_PN: np.ndarray) -> dict[str, float]:
    """Metrics of a table of verdicts, bool[P, n]: Pass@1 as the mean over samples, and Pass@n."""
    samples = correct_PN.shape[1]
    metrics = {}
    for k in sorted({1, samples}):
        values_P = pass_at_k(correct_PN.sum(-1), samples, k)
        low, high = bootstrap.interval(values_P)
        metrics |= {
            f"eval/pass_at_{k}": float(values_P.mean()),
            f"eval/pass_at_{k}_low": low,
            f"eval/pass_at_{k}_high": high,
        }
    return metrics


def evaluate(
    sample: Callable[..., Rollout],
    scorer: rewards.Scorer,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    samples: int,
    width: int,
    batch: int,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of a policy on held-out examples.

    Args:
      sample: ``sample(prompts, on_groups=…)`` draws ``samples`` completions of each of ``batch``
        prompts, as `sampler.rollout` does.
      scorer: judges while the next are drawn; correct is what has an accuracy of 1.
      examples: the evaluation set; the last batch is filled up with its own examples.
      tokenizer: of the policy.
      samples: completions per prompt.
      width: tokens of room for a prompt.
      batch: prompts sampled at a time.
      names: of the tasks that ``Example.task`` counts, for metrics of each of them.

    Returns:
      ``eval/pass_at_1``, ``eval/pass_at_<samples>``, each with ``_low`` and ``_high``, and
      ``eval/length_mean``; with names, ``eval/<name>/pass_at_1`` and so on too.
    """
    judged, lengths = [], []
    for start in range(0, len(examples), batch):
        real = list(examples[start : start + batch])
        filled = (real * batch)[:batch]
        groups = rewards.Groups(scorer, filled, tokenizer)
        rows = sample(encode.encode_prompts(filled, tokenizer, width), on_groups=groups)
        judged.append((groups, len(real)))
        lengths.append(sampler.ends(rows)[0].reshape(batch, samples)[: len(real)])
    correct_PN = np.array(
        [
            verdict.parts["accuracy"] == 1
            for groups, real in judged
            for verdict in groups.wait()[: real * samples]
        ]
    ).reshape(-1, samples)
    metrics = summarise(correct_PN)
    task_P = np.array([example.task for example in examples])
    for k, name in enumerate(names):
        if (task_P == k).any():
            own = summarise(correct_PN[task_P == k])
            metrics |= {key.replace("eval/", f"eval/{name}/"): x for key, x in own.items()}
    return metrics | {"eval/length_mean": float(np.concatenate(lengths).mean())}


def held_out(
    settings: Settings,
    params: Any,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Metrics on the fixed evaluation set; the same noise at every iteration."""
    weights = sampler.to_sampler(params, settings.model)
    draw = partial(sample, settings, weights, iteration=0, domain="eval", warm_up=warm_up)
    count = settings.config.eval.prompts
    count = min(settings.eval_batch, count) if warm_up else count
    return evaluated(settings, draw, scorer, test_set(settings, count))


def test_set(settings: Settings, count: int) -> list[Example]:
    """The first ``count`` examples of the evaluation set, in the tasks' shares."""
    parts = collections.Counter(streams.slots(settings.shares, count))
    sources = list(settings.sources("test").values())
    return [
        example
        for k in sorted(parts)
        for example in encode.held_out(sources[k], parts[k], keep=settings.keep, task=k)
    ]


def evaluated(
    settings: Settings, draw: Callable[..., Rollout], scorer: rewards.Scorer, chosen: list[Example]
) -> dict[str, float]:
    """Metrics of what ``draw`` writes to the chosen examples, see `evaluate`."""
    return evaluate(
        draw,
        scorer,
        chosen,
        settings.tokenizer,
        samples=settings.config.eval.samples,
        width=settings.width,
        batch=settings.eval_batch,
        names=tuple(settings.tasks) if len(settings.tasks) > 1 else (),
    )
