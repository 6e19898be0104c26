"""What an iteration learns from: sampled and judged completions, or worked demonstrations."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sapo_jax import advantages, data, evaluate, learner, rewards, sampler, sharding, streams
from sapo_jax.progress import Clock
from sapo_jax.settings import Settings
from sapo_jax.tasks.base import Example
from sapo_jax.types import LENGTH, Batch, Prompts, Rollout


class Experience(NamedTuple):
    """The minibatches of an iteration, its metrics, and rows for a person to read."""

    minibatches: tuple[Batch, ...]
    metrics: dict[str, float]
    samples: list[dict]


def sample(
    settings: Settings,
    params: Any,
    prompts: Prompts,
    *,
    iteration: int,
    domain: str = "train",
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
        warm_up=warm_up,
        **controls,
    )


@partial(jax.jit, static_argnames=("parts", "mesh"))
def _split(batch: Batch, parts: int, mesh: Mesh | None) -> tuple[Batch, ...]:
    """Minibatches: the same rows on any mesh, each split over all of it."""
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    minibatches = tuple(jax.tree.map(operator.itemgetter(i), pieces) for i in range(parts))
    return sharding.constrain(minibatches, mesh, sharding.spec("rows"))


@partial(jax.jit, static_argnames=("estimator", "group_size"))
def _batch(rollout: Rollout, rewards_B: jax.Array, *, estimator: str, group_size: int) -> Batch:
    return Batch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        segments=rollout.segments,
        sampler_logp=rollout.sampler_logp,
        old_logp=rollout.sampler_logp,
        advantages=advantages.ESTIMATORS[estimator](rewards_B, group_size),
        routing=rollout.routing,
    )


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


def from_rollout(
    settings: Settings,
    params: Any,
    reference: Any,
    stream: streams.Stream,
    iteration: int,
    clock: Clock,
    warm_up: Callable[[str], None] | None = None,
) -> Experience:
    """Sample, judge, and attach advantages and the log-probabilities that the objective needs."""
    c = settings.config
    group_size = c["batch"]["group_size"]
    examples = stream.take(c["batch"]["prompts"])
    with clock("to_sampler"):
        weights = jax.block_until_ready(sampler.to_sampler(params, settings.model))
    with clock("rollout"):
        prompts = data.encode_prompts(examples, settings.tokenizer, settings.width)
        rollout = sample(settings, weights, prompts, iteration=iteration, warm_up=warm_up)
        on_host = jax.device_get(rollout)
    with clock("score"):
        asked = [e for e in examples for _ in range(group_size)]
        texts = rewards.completion_texts(on_host.tokens, on_host.mask, settings.tokenizer)
        scored = rewards.rows_of(asked, texts, on_host.finished, on_host.mask.sum(-1))
        rewards_B, parts = rewards.score_rows(settings.task, scored, settings.recipe)
    with clock("update"):
        scored_B = sharding.feed(rewards_B, settings.mesh)
        batch = _batch(rollout, scored_B, estimator=c["advantages"], group_size=group_size)
        minibatches = _split(batch, c["batch"]["minibatches"], settings.mesh)
        score = partial(learner.score, hp=settings.hp)
        if settings.hp.routing_replay == "R2":
            minibatches = tuple(_with_routing(params, b, settings.hp) for b in minibatches)
        elif c["learner"]["old_logp"] == "recompute":
            minibatches = tuple(b.replace(old_logp=score(params, b)) for b in minibatches)
        if reference is not None:
            score = partial(learner.score, hp=settings.hp.replace(routing_replay="none"))
            minibatches = tuple(b.replace(ref_logp=score(reference, b)) for b in minibatches)
        advantages_B = np.asarray(batch.advantages)
    rows = _rows(on_host, asked, texts, rewards_B, advantages_B, iteration, c["log"]["samples"])
    metrics = _metrics(on_host, rewards_B, group_size) | _by_task(settings, asked, rewards_B)
    metrics |= {"data/dropped": float(stream.dropped), **parts}
    metrics["sampler/weights_moved_bytes"] = float(sampler.moved_bytes(params, weights))
    return Experience(minibatches, metrics, rows)


def from_demonstrations(
    settings: Settings,
    params: Any,
    reference: Any,
    stream: streams.Stream,
    iteration: int,
    clock: Clock,
    warm_up: Callable[[str], None] | None = None,
) -> Experience:
    """Worked answers as minibatches; nothing is sampled."""
    del params, reference, iteration, warm_up
    with clock("rollout"):
        width = settings.width + settings.max_new_tokens
        batch = data.encode_demonstrations(stream.take(settings.rows), settings.tokenizer, width)
        batch = sharding.feed(batch, settings.mesh)
        minibatches = _split(batch, settings.config["batch"]["minibatches"], settings.mesh)
    metrics = {"length/mean": float(batch.mask.sum(-1).mean())}
    return Experience(minibatches, metrics | {"data/dropped": float(stream.dropped)}, [])


SOURCES = {"rollout": from_rollout, "demonstrations": from_demonstrations}


def held_out(
    settings: Settings, params: Any, warm_up: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Metrics on the fixed evaluation set; the same noise at every iteration."""
    options = settings.config["eval"]
    count = min(settings.eval_batch, options["prompts"]) if warm_up else options["prompts"]
    weights = sampler.to_sampler(params, settings.model)
    parts = collections.Counter(streams.slots(settings.shares, count))
    sources = list(settings.sources("test").values())
    chosen = [
        example
        for k in sorted(parts)
        for example in data.held_out(sources[k], parts[k], keep=settings.keep, task=k)
    ]
    return evaluate.evaluate(
        partial(sample, settings, weights, iteration=0, domain="eval", warm_up=warm_up),
        settings.task,
        chosen,
        settings.tokenizer,
        samples=options["samples"],
        width=settings.width,
        batch=settings.eval_batch,
        names=tuple(settings.tasks) if len(settings.tasks) > 1 else (),
        recipe=settings.recipe,
    )
