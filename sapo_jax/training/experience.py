"""What an iteration learns from: sampled and judged completions, or worked demonstrations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import advantages, learner, rewards, sampler
from sapo_jax.data import encode
from sapo_jax.data import stream as streams
from sapo_jax.parallel import sharding
from sapo_jax.tasks.base import Example
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.types import LENGTH, Batch, Prompts, Rollout


class Experience(NamedTuple):
    """The minibatches of an iteration, its metrics, and rows for a person to read."""

    minibatches: tuple[Batch, ...]
    metrics: dict[str, float]
    samples: list[dict]


class Asked(NamedTuple):
    """What an iteration asks, and what judges the answers."""

    examples: list[Example]
    prompts: Prompts
    groups: rewards.Groups


def sample(
    settings: Settings,
    params: Any,
    prompts: Prompts,
    *,
    iteration: int,
    domain: str = "train",
    on_groups: sampler.OnGroups | None = None,
    warm_up: Callable[[str], None] | None = None,
) -> Rollout:
    """A rollout with the run's settings; the domain "eval" takes those of the evaluation."""
    options = settings.config.eval
    controls: dict[str, Any] = {
        "group_size": settings.config.batch.group_size,
        "temperature": settings.config.sampler.temperature,
        "plan": settings.plan,
    }
    if domain == "eval":
        controls = {
            "group_size": options.samples,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "plan": settings.eval_plan,
        }
    return sampler.rollout(
        params,
        settings.model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.config.seed,
        iteration=iteration,
        domain=domain,
        on_groups=on_groups,
        warm_up=warm_up,
        **controls,
    )


@jax.jit
def batch_of(rollout: Rollout) -> Batch:
    """The rows, whose advantages are not known yet."""
    return Batch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        segments=rollout.segments,
        sampler_logp=rollout.sampler_logp,
        old_logp=rollout.sampler_logp,
        advantages=jnp.zeros(len(rollout.tokens)),
        routing=rollout.routing,
    )


def _scored(settings: Settings, params: Any, reference: Any, batch: Batch) -> tuple[Batch, ...]:
    """Minibatches with the log-probabilities, and the routing, that their update needs.

    Of all prompts, also where more were drawn than are learnt from: that is not known yet.
    """
    options = settings.config.batch
    parts = options.minibatches * options.oversample
    minibatches = learner.split_rows(batch, parts, settings.mesh)
    score = partial(learner.score, hp=settings.hp)
    if settings.hp.static.routing_replay == "R2":
        minibatches = tuple(_with_routing(params, b, settings.hp) for b in minibatches)
    elif settings.config.learner.old_logp == "recompute":
        minibatches = tuple(b.replace(old_logp=score(params, b)) for b in minibatches)
    if reference is not None:
        score = partial(learner.score, hp=settings.hp.replace(routing_replay="none"))
        minibatches = tuple(b.replace(ref_logp=score(reference, b)) for b in minibatches)
    return minibatches


def _with_routing(params: Any, batch: Batch, hp: learner.Hyperparameters) -> Batch:
    """The batch with the old policy's log π and routing, for R2."""
    logp, routing = learner.score_routing(params, batch, hp)
    return batch.replace(old_logp=logp, routing=routing)


def _rows(
    asked: Asked, group_size: int, finished_B, rewards_B, advantages_B, iteration: int, count: int
) -> list[dict]:
    """The first two completions of as many prompts as ``count`` allows, of those sampled here."""
    texts = asked.groups.texts(group_size)
    first = (i for i, text in enumerate(texts) if i % group_size < 2 and text is not None)
    return [
        {
            "iteration": iteration,
            "prompt_id": asked.examples[i // group_size].id,
            "sample_index": i % group_size,
            "prompt": asked.examples[i // group_size].prompt,
            "completion": texts[i],
            "answer": asked.examples[i // group_size].answer,
            "reward": float(rewards_B[i]),
            "advantage": float(advantages_B[i]),
            "finished": int(finished_B[i]),
        }
        for i in itertools.islice(first, count)
    ]


def _metrics(length_B, finished_B, rewards_B: np.ndarray, group_size: int) -> dict[str, float]:
    rewards_PG = rewards_B.reshape(-1, group_size)
    return {
        "reward/mean": float(rewards_B.mean()),
        "reward/std": float(rewards_B.std()),
        "advantage/zero_groups": float(np.mean(rewards_PG.max(-1) == rewards_PG.min(-1))),
        "length/mean": float(length_B.mean()),
        "length/max": float(length_B.max()),
        "length/truncated": float(np.mean(finished_B == LENGTH)),
    }


def _by_task(settings: Settings, asked: Asked, rewards_B: np.ndarray) -> dict[str, float]:
    """The mean reward of each task of a mixture."""
    if len(settings.tasks) == 1:
        return {}
    task_B = np.repeat(asked.prompts.task, settings.config.batch.group_size)
    return {
        f"reward/{name}": float(rewards_B[task_B == k].mean())
        for k, name in enumerate(settings.tasks)
    }


def open_stream(settings: Settings, *, workers: int = 0) -> streams.Stream:
    """The training examples from the beginning, in the order of the run's seed."""
    sources, seed = settings.sources("train"), settings.config.seed
    shares, keep = settings.shares, settings.keep
    return streams.Stream(sources, seed, shares=shares, keep=keep, workers=workers)


def ask(settings: Settings, stream: streams.Stream, scorer: rewards.Scorer) -> Asked:
    """The prompts of the next iteration, more than P where some are drawn to spare."""
    batch = settings.config.batch
    examples = stream.take(batch.prompts * batch.oversample)
    prompts = encode.encode_prompts(examples, settings.tokenizer, settings.width)
    return Asked(examples, prompts, rewards.Groups(scorer, examples, settings.tokenizer))


def kept(settings: Settings, rewards_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
    """Which rows to learn from, whether their groups have a signal, and metrics of that."""
    batch = settings.config.batch
    if batch.oversample == 1:
        return np.arange(len(rewards_B), dtype=np.int32), np.ones(len(rewards_B), bool), {}
    rows_B, signal_B = advantages.informative(rewards_B, batch.group_size, batch.prompts)
    return rows_B, signal_B, {"advantage/kept_groups": float(signal_B.mean())}


def recipe_of(settings: Settings) -> dict[str, Any]:
    """What is static in `learner.make_minibatches`."""
    c = settings.config
    return {
        "estimator": c.advantages,
        "group_size": c.batch.group_size,
        "kl": c.reward.kl,
        "correction": c.correction.name,
        "parts": c.batch.minibatches,
    }


def told(
    settings: Settings,
    asked: Asked,
    ends: tuple[np.ndarray, np.ndarray],
    rewards_B: np.ndarray,
    advantages_B: np.ndarray,
    iteration: int,
) -> tuple[dict[str, float], list[dict]]:
    """Metrics of a judged rollout, and rows of it for a person to read; ends: `sampler.ends`."""
    c, (length_B, finished_B) = settings.config, ends
    group_size, count = c.batch.group_size, c.log.samples
    rows = _rows(asked, group_size, finished_B, rewards_B, advantages_B, iteration, count)
    metrics = _metrics(length_B, finished_B, rewards_B, group_size)
    return metrics | _by_task(settings, asked, rewards_B), rows


def from_rollout(
    settings: Settings,
    params: Any,
    reference: Any,
    stream: streams.Stream,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> Experience:
    """Sample, judge, and attach advantages and the log-probabilities that the objective needs."""
    asked = ask(settings, stream, scorer)
    with clock("to_sampler"):
        weights = jax.block_until_ready(sampler.to_sampler(params, settings.model))
    with clock("rollout"):
        controls = {"iteration": iteration, "on_groups": asked.groups, "warm_up": warm_up}
        rollout = sample(settings, weights, asked.prompts, **controls)
        ends = sampler.ends(rollout)
    with clock("update"):  # needs no rewards: the device works while rows are judged
        minibatches = _scored(settings, params, reference, batch_of(rollout))
    with clock("score_exposed"):
        verdicts = asked.groups.wait()
    clock.add("score", sum(verdict.seconds for verdict in verdicts))
    with clock("update"):
        rewards_B, parts = rewards.combine([v.parts for v in verdicts], settings.recipe)
        rows_B, signal_B, of_kept = kept(settings, rewards_B)
        minibatches, more = learner.make_minibatches(
            learner.select_rows(minibatches, rows_B, signal_B, settings.mesh),
            rewards_B[rows_B],
            settings.config.reward.kl_coef,
            settings.bounds,
            mesh=settings.mesh,
            **recipe_of(settings),
        )
        advantages_B = np.zeros_like(rewards_B)
        advantages_B[rows_B] = np.concatenate(sharding.to_host([b.advantages for b in minibatches]))
    metrics, rows = told(settings, asked, ends, rewards_B, advantages_B, iteration)
    metrics |= {"data/dropped": float(stream.dropped), **parts, **of_kept}
    metrics["sampler/weights_moved_bytes"] = float(sampler.moved_bytes(params, weights))
    metrics |= {key: float(value) for key, value in sharding.to_host(more).items()}
    return Experience(minibatches, metrics, rows)


def from_demonstrations(
    settings: Settings,
    params: Any,
    reference: Any,
    stream: streams.Stream,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> Experience:
    """Worked answers as minibatches; nothing is sampled."""
    del params, reference, iteration, scorer, warm_up
    with clock("rollout"):
        width = settings.width + settings.max_new_tokens
        batch = encode.encode_demonstrations(stream.take(settings.rows), settings.tokenizer, width)
        metrics = {"length/mean": float(batch.mask.sum(-1).mean())}
        batch = sharding.place(batch, settings.mesh)
        minibatches = learner.split_rows(batch, settings.config.batch.minibatches, settings.mesh)
    return Experience(minibatches, metrics | {"data/dropped": float(stream.dropped)}, [])


SOURCES = {"rollout": from_rollout, "demonstrations": from_demonstrations}
