"""What an iteration learns from: sampled and judged completions, or worked demonstrations."""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import (
    advantages,
    data,
    evaluate,
    learnable,
    learner,
    rewards,
    sampler,
    sharding,
    streams,
)
from sapo_jax.progress import Clock
from sapo_jax.settings import Settings
from sapo_jax.tasks.base import Example
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
    options = settings.config["eval"]
    controls: dict[str, Any] = {
        "group_size": settings.config["batch"]["group_size"],
        "temperature": settings.config["sampler"]["temperature"],
        "plan": settings.plan,
    }
    if domain == "eval":
        controls = {
            "group_size": options["samples"],
            "temperature": options["temperature"],
            "top_k": options["top_k"],
            "top_p": options["top_p"],
            "plan": settings.eval_plan,
        }
    return sampler.rollout(
        params,
        settings.model,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.config["seed"],
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
    options = settings.config["batch"]
    parts = options["minibatches"] * options["oversample"]
    minibatches = learnable.split(batch, parts, settings.mesh)
    score = partial(learner.score, hp=settings.hp)
    if settings.hp.routing_replay == "R2":
        minibatches = tuple(_with_routing(params, b, settings.hp) for b in minibatches)
    elif settings.config["learner"]["old_logp"] == "recompute":
        minibatches = tuple(b.replace(old_logp=score(params, b)) for b in minibatches)
    if reference is not None:
        score = partial(learner.score, hp=settings.hp.replace(routing_replay="none"))
        minibatches = tuple(b.replace(ref_logp=score(reference, b)) for b in minibatches)
    return minibatches


def _with_routing(params: Any, batch: Batch, hp: learner.Hyperparameters) -> Batch:
    """The batch with the old policy's log π and routing, for R2."""
    logp, routing = learner.score_routing(params, batch, hp)
    return batch.replace(old_logp=logp, routing=routing)


def _rows(rollout: Rollout, examples, texts, rewards_B, advantages_B, iteration, count) -> list:
    """The first two completions of as many prompts as ``count`` allows."""
    chosen = np.flatnonzero(rollout.sample_index < 2)[:count]
    return [
        {
            "iteration": iteration,
            "prompt_id": int(rollout.prompt_id[i]),
            "sample_index": int(rollout.sample_index[i]),
            "prompt": examples[i].prompt,
            "completion": texts[i],
            "answer": examples[i].answer,
            "reward": float(rewards_B[i]),
            "advantage": float(advantages_B[i]),
            "finished": int(rollout.finished[i]),
        }
        for i in chosen
    ]


def _metrics(rollout: Rollout, rewards_B: np.ndarray, group_size: int) -> dict[str, float]:
    length_B = rollout.mask.sum(-1)
    rewards_PG = rewards_B.reshape(-1, group_size)
    return {
        "reward/mean": float(rewards_B.mean()),
        "reward/std": float(rewards_B.std()),
        "advantage/zero_groups": float(np.mean(rewards_PG.max(-1) == rewards_PG.min(-1))),
        "length/mean": float(length_B.mean()),
        "length/max": float(length_B.max()),
        "length/truncated": float(np.mean(rollout.finished == LENGTH)),
    }


def _by_task(settings: Settings, asked: list[Example], rewards_B: np.ndarray) -> dict[str, float]:
    """The mean reward of each task of a mixture."""
    if len(settings.tasks) == 1:
        return {}
    task_B = np.array([example.task for example in asked])
    return {
        f"reward/{name}": float(rewards_B[task_B == k].mean())
        for k, name in enumerate(settings.tasks)
    }


def open_stream(settings: Settings, *, workers: int = 0) -> streams.Stream:
    """The training examples from the beginning, in the order of the run's seed."""
    sources, seed = settings.sources("train"), settings.config["seed"]
    shares, keep = settings.shares, settings.keep
    return streams.Stream(sources, seed, shares=shares, keep=keep, workers=workers)


def ask(settings: Settings, stream: streams.Stream, scorer: rewards.Scorer) -> Asked:
    """The prompts of the next iteration, more than P where some are drawn to spare."""
    batch = settings.config["batch"]
    examples = stream.take(batch["prompts"] * batch["oversample"])
    prompts = data.encode_prompts(examples, settings.tokenizer, settings.width)
    return Asked(examples, prompts, rewards.Groups(scorer, examples, settings.tokenizer))


def kept(settings: Settings, rewards_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
    """Which rows to learn from, whether their groups have a signal, and metrics of that."""
    batch = settings.config["batch"]
    if batch["oversample"] == 1:
        return np.arange(len(rewards_B), dtype=np.int32), np.ones(len(rewards_B), bool), {}
    rows_B, signal_B = advantages.informative(rewards_B, batch["group_size"], batch["prompts"])
    return rows_B, signal_B, {"advantage/kept_groups": float(signal_B.mean())}


def recipe_of(settings: Settings) -> dict[str, Any]:
    """What is static in `learnable.learnable`."""
    c = settings.config
    return {
        "estimator": c["advantages"],
        "group_size": c["batch"]["group_size"],
        "kl": c["reward"]["kl"],
        "correction": c["correction"]["name"],
        "parts": c["batch"]["minibatches"],
    }


def told(
    settings: Settings,
    asked: Asked,
    rollout: Rollout,
    rewards_B: np.ndarray,
    advantages_B: np.ndarray,
    iteration: int,
) -> tuple[dict[str, float], list[dict]]:
    """Metrics of a judged rollout on the host, and rows of it for a person to read."""
    c, group_size = settings.config, settings.config["batch"]["group_size"]
    examples = [e for e in asked.examples for _ in range(group_size)]
    arguments = (examples, asked.groups.texts, rewards_B, advantages_B, iteration)
    rows = _rows(rollout, *arguments, c["log"]["samples"])
    metrics = _metrics(rollout, rewards_B, group_size)
    return metrics | _by_task(settings, examples, rewards_B), rows


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
        on_host = jax.device_get(rollout)
    with clock("update"):  # needs no rewards: the device works while rows are judged
        minibatches = _scored(settings, params, reference, batch_of(rollout))
    with clock("score_exposed"):
        verdicts = asked.groups.wait()
    clock.add("score", sum(verdict.seconds for verdict in verdicts))
    with clock("update"):
        rewards_B, parts = rewards.combine([v.parts for v in verdicts], settings.recipe)
        rows_B, signal_B, of_kept = kept(settings, rewards_B)
        minibatches, more = learnable.learnable(
            learnable.take(minibatches, rows_B, signal_B, settings.mesh),
            rewards_B[rows_B],
            settings.config["reward"]["kl_coef"],
            settings.bounds,
            mesh=settings.mesh,
            **recipe_of(settings),
        )
        advantages_B = np.zeros_like(rewards_B)
        advantages_B[rows_B] = np.concatenate([batch.advantages for batch in minibatches])
    metrics, rows = told(settings, asked, on_host, rewards_B, advantages_B, iteration)
    metrics |= {"data/dropped": float(stream.dropped), **parts, **of_kept}
    metrics["sampler/weights_moved_bytes"] = float(sampler.moved_bytes(params, weights))
    return Experience(minibatches, metrics | {k: float(v) for k, v in more.items()}, rows)


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
        batch = data.encode_demonstrations(stream.take(settings.rows), settings.tokenizer, width)
        batch = sharding.feed(batch, settings.mesh)
        minibatches = learnable.split(batch, settings.config["batch"]["minibatches"], settings.mesh)
    metrics = {"length/mean": float(batch.mask.sum(-1).mean())}
    return Experience(minibatches, metrics | {"data/dropped": float(stream.dropped)}, [])


SOURCES = {"rollout": from_rollout, "demonstrations": from_demonstrations}


def held_out(
    settings: Settings,
    params: Any,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Metrics on the fixed evaluation set; the same noise at every iteration."""
    weights = sampler.to_sampler(params, settings.model)
    draw = partial(sample, settings, weights, iteration=0, domain="eval", warm_up=warm_up)
    count = settings.config["eval"]["prompts"]
    count = min(settings.eval_batch, count) if warm_up else count
    return evaluated(settings, draw, scorer, test_set(settings, count))


def test_set(settings: Settings, count: int) -> list[Example]:
    """The first ``count`` examples of the evaluation set, in the tasks' shares."""
    parts = collections.Counter(streams.slots(settings.shares, count))
    sources = list(settings.sources("test").values())
    return [
        example
        for k in sorted(parts)
        for example in data.held_out(sources[k], parts[k], keep=settings.keep, task=k)
    ]


def evaluated(
    settings: Settings, draw: Callable[..., Rollout], scorer: rewards.Scorer, chosen: list[Example]
) -> dict[str, float]:
    """Metrics of what ``draw`` writes to the chosen examples, see `evaluate.evaluate`."""
    return evaluate.evaluate(
        draw,
        scorer,
        chosen,
        settings.tokenizer,
        samples=settings.config["eval"]["samples"],
        width=settings.width,
        batch=settings.eval_batch,
        names=tuple(settings.tasks) if len(settings.tasks) > 1 else (),
    )
