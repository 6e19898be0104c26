"""Pass@1 and Pass@k on fixed held-out sets, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sapo_jax import rewards
from sapo_jax.data import encode
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example
from sapo_jax.training import bootstrap
from sapo_jax.training.engine import Bundle
from sapo_jax.training.evals import MEAN, Evals, Evaluation, alike
from sapo_jax.types import Prompts


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
        low, high = bootstrap.of_shares(values_P)
        metrics |= {
            f"eval/pass_at_{k}": float(values_P.mean()),
            f"eval/pass_at_{k}_low": low,
            f"eval/pass_at_{k}_high": high,
        }
    return metrics


class Judged(NamedTuple):
    """Judged completions of held-out prompts by one policy."""

    correct: np.ndarray  # bool[P, n]
    length: np.ndarray  # i[P, n], tokens
    function: np.ndarray | None = None  # f[P, n], of a reward function

    def at(self, prompts: slice) -> Judged:
        """The completions of some of the prompts."""
        return Judged(*(None if x is None else x[prompts] for x in self))

    def metrics(self) -> dict[str, float]:
        """``eval/pass_at_1``, ``eval/pass_at_<n>``, with ``_low`` and ``_high``, and the means."""
        found = summarise(self.correct)
        if self.function is not None:
            found["eval/reward_function"] = float(self.function.mean())
        return found | {"eval/length_mean": float(self.length.mean())}


def judge(
    sample: Callable[[Prompts, list[rewards.Groups]], list[np.ndarray]],
    scorer: rewards.Scorer,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    samples: int,
    width: int,
    batch: int,
    policies: int = 1,
    images: Any = None,
) -> list[Judged]:
    """Completions of held-out examples by each policy.

    Args:
      sample: ``sample(prompts, on_groups)`` draws ``samples`` completions of each of ``batch``
        prompts by each policy, calls the policy's ``on_groups`` as `sampler.rollout` does, and
        returns the lengths i[B] of each.
      scorer: judges while the next are drawn; correct is what has an accuracy of 1.
      examples: the evaluation set; the last batch is filled up with its own examples.
      tokenizer: of the policies.
      samples: completions per prompt.
      width: tokens of room for a prompt.
      batch: prompts sampled at a time.
      policies: how many.
      images: what images have room in, see `encode.encode_prompts`.
    """
    drawn, alone = [], np.zeros(batch, np.int32)  # noise does not go by what else is in a batch
    for start in range(0, len(examples), batch):
        real = list(examples[start : start + batch])
        filled = (real * batch)[:batch]
        groups = [rewards.Groups(scorer, filled, tokenizer) for _ in range(policies)]
        prompts = encode.encode_prompts(filled, tokenizer, width, images)
        lengths = sample(prompts.replace(occurrence=alone), groups)
        drawn.append((len(real) * samples, groups, lengths))

    def of_policy(r):
        parts = [v.parts for rows, groups, _ in drawn for v in groups[r].wait()[:rows]]
        length_B = np.concatenate([lengths[r][:rows] for rows, _, lengths in drawn])
        columns = [np.array([p["accuracy"] == 1 for p in parts]), length_B]
        if "function" in parts[0]:
            columns.append(np.array([p["function"] for p in parts]))
        return Judged(*(x.reshape(-1, samples) for x in columns))

    return [of_policy(r) for r in range(policies)]


def evaluate(*arguments, **options) -> list[dict[str, float]]:
    """`Judged.metrics` of what `judge` returns."""
    return [judged.metrics() for judged in judge(*arguments, **options)]


def held_out(
    bundle: Bundle,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
    on_segment: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Metrics of each run on the fixed evaluation sets; the same noise at every iteration.

    With ``warm_up``, programs are compiled, by a batch of each kind, and there are no metrics.
    """
    engine, run = bundle.engine, bundle.engine.runs[0]
    weights = engine.to_sampler(bundle.state.params, bundle.frozen)
    found: list[dict[str, Judged]] = [{} for _ in engine.runs]
    for names in alike(run.evals):
        first, sets = run.evals[names[0]], [run.evals[name].examples for name in names]

        def sample(prompts, on_groups, evaluation=names[0]):
            every, controls = [prompts] * len(on_groups), {"iteration": 0, "warm_up": warm_up}
            controls |= {"evaluation": evaluation, "on_segment": on_segment}
            _, ends = engine.rollout(weights, every, on_groups, **controls)
            return [own.length for own in ends]

        examples = [example for each in sets for example in each]
        examples = encode.swapped(examples) if run.config.data.swap_images else examples
        every = judge(
            sample,
            scorer,
            examples[: first.batch] if warm_up else examples,
            run.tokenizer,
            samples=first.samples,
            width=run.width,
            batch=first.batch,
            policies=len(engine.runs),
            images=run.images,
        )
        ends = np.cumsum([0, *map(len, sets)])
        for own, judged in zip(found, every, strict=True):
            for name, start, end in zip(names, ends, ends[1:], strict=False):
                own[name] = judged.at(slice(start, end))
    return [] if warm_up else [_metrics(run.evals, own, run.config.eval.best) for own in found]


def _metrics(evals: Evals, judged: Mapping[str, Judged], best: str) -> dict[str, float]:
    """Metrics of each evaluation, and of named ones what the best checkpoint goes by."""
    found: dict[str, float] = {}
    for name in evals:
        own = judged[name].metrics() | _of_tasks(evals[name], judged[name])
        found |= _under(name, own) if name else own
    if "" not in judged:
        scored = judged.values() if best == MEAN else [judged[best]]
        values = [own.correct.mean(-1) for own in scored]
        low, high = bootstrap.of_shares(*values)
        mean = float(np.mean([values_P.mean() for values_P in values]))
        found |= {"eval/pass_at_1": mean, "eval/pass_at_1_low": low, "eval/pass_at_1_high": high}
    return found


def _of_tasks(evaluation: Evaluation, judged: Judged) -> dict[str, float]:
    """The same of each task, where there are several."""
    found, tasks = {}, list(evaluation.tasks)
    task_P = np.array([example.task for example in evaluation.examples]) - evaluation.offset
    for k, name in enumerate(tasks if len(tasks) > 1 else ()):
        if (task_P == k).any():
            found |= _under(name, summarise(judged.correct[task_P == k]))
    return found


def _under(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {key.replace("eval/", f"eval/{name}/", 1): value for key, value in metrics.items()}
