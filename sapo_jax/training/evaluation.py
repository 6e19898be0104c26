"""Pass@1 and Pass@k on fixed held-out sets, with bootstrap intervals over prompts."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np

from sapo_jax import rewards
from sapo_jax.data import encode
from sapo_jax.data.stream import slots
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example
from sapo_jax.training import bootstrap
from sapo_jax.training.checks import require
from sapo_jax.training.engine import Bundle
from sapo_jax.training.settings import Settings
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
        low, high = bootstrap.interval(values_P)
        metrics |= {
            f"eval/pass_at_{k}": float(values_P.mean()),
            f"eval/pass_at_{k}_low": low,
            f"eval/pass_at_{k}_high": high,
        }
    return metrics


def evaluate(
    sample: Callable[[Prompts, list[rewards.Groups]], list[np.ndarray]],
    scorer: rewards.Scorer,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    samples: int,
    width: int,
    batch: int,
    names: Sequence[str] = (),
    policies: int = 1,
) -> list[dict[str, float]]:
    """Metrics of policies on held-out examples.

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
      names: of the tasks that ``Example.task`` counts, for metrics of each of them.
      policies: how many.

    Returns:
      Of each policy ``eval/pass_at_1``, ``eval/pass_at_<samples>``, each with ``_low`` and
      ``_high``, and ``eval/length_mean``; with names, ``eval/<name>/pass_at_1`` and so on too.
    """
    drawn = []
    for start in range(0, len(examples), batch):
        real = list(examples[start : start + batch])
        filled = (real * batch)[:batch]
        groups = [rewards.Groups(scorer, filled, tokenizer) for _ in range(policies)]
        lengths = sample(encode.encode_prompts(filled, tokenizer, width), groups)
        drawn.append((len(real) * samples, groups, lengths))
    task_P = np.array([example.task for example in examples])

    def of_policy(r):
        verdicts = [v for rows, groups, _ in drawn for v in groups[r].wait()[:rows]]
        length_B = np.concatenate([lengths[r][:rows] for rows, _, lengths in drawn])
        correct_B = np.array([verdict.parts["accuracy"] == 1 for verdict in verdicts])
        correct_PN = correct_B.reshape(-1, samples)
        metrics = summarise(correct_PN)
        for k, name in enumerate(names):
            if (task_P == k).any():
                own = summarise(correct_PN[task_P == k])
                metrics |= {key.replace("eval/", f"eval/{name}/"): x for key, x in own.items()}
        if "function" in verdicts[0].parts:
            own = [verdict.parts["function"] for verdict in verdicts]
            metrics["eval/reward_function"] = float(np.mean(own))
        return metrics | {"eval/length_mean": float(length_B.mean())}

    return [of_policy(r) for r in range(policies)]


def held_out(
    bundle: Bundle,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
    on_segment: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Metrics of each run on the fixed evaluation set; the same noise at every iteration."""
    engine, run = bundle.engine, bundle.engine.runs[0]
    weights = engine.to_sampler(bundle.state.params, bundle.frozen)
    count = run.config.eval.prompts

    def sample(prompts, on_groups):
        every, controls = [prompts] * len(on_groups), {"iteration": 0, "domain": "eval"}
        controls |= {"warm_up": warm_up, "on_segment": on_segment}
        _, ends = engine.rollout(weights, every, on_groups, **controls)
        return [own.length for own in ends]

    return evaluate(
        sample,
        scorer,
        test_set(run, min(run.eval_batch, count) if warm_up else count),
        run.tokenizer,
        samples=run.config.eval.samples,
        width=run.width,
        batch=run.eval_batch,
        names=tuple(run.tasks) if len(run.tasks) > 1 else (),
        policies=len(engine.runs),
    )


def test_set(run: Settings, count: int) -> list[Example]:
    """The first ``count`` examples of the evaluation set, in the tasks' shares.

    Raises:
      ValueError: a task has too few, or none with room.
    """
    parts = collections.Counter(slots(run.shares, count))
    sources = list(run.sources("test").values())
    for name, source in run.sources("test").items():
        room = f"larger: no prompt of the test split of {name} has room"
        some = run.keep is None or encode.distinct(source, 1, keep=run.keep)
        require(bool(some), "data.max_prompt_tokens", run.width, room)
    return [
        example
        for k in sorted(parts)
        for example in encode.held_out(sources[k], parts[k], total=count, keep=run.keep, task=k)
    ]
