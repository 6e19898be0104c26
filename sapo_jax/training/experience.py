"""What an iteration learns from: sampled and judged completions, or worked demonstrations.

A source starts an iteration of an engine's runs and returns a function that finishes it, so that
another engine can sample while the rows of this one are judged.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import advantages, learner, rewards, sampler
from sapo_jax.data import encode
from sapo_jax.data.stream import Stream
from sapo_jax.tasks.base import Example
from sapo_jax.training.engine import Bundle, Ends
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.types import LENGTH, Batch, Prompts, Rollout


class Experience(NamedTuple):
    """Minibatches for the engine, and of each run its metrics and rows for a person to read."""

    minibatches: tuple[Batch, ...]
    metrics: list[dict[str, float]]
    samples: list[list[dict]]


class Query(NamedTuple):
    """The prompts of an iteration of a run, and what judges their completions."""

    examples: list[Example]
    prompts: Prompts
    groups: rewards.Groups


def open_stream(run: Settings, *, workers: int = 0) -> Stream:
    """The training examples from the beginning, in the order of the run's seed."""
    sources, seed = run.sources("train"), run.config.seed
    return Stream(sources, seed, shares=run.shares, keep=run.keep, workers=workers)


def next_query(run: Settings, stream: Stream, scorer: rewards.Scorer) -> Query:
    """The next prompts, more than P where some are drawn to spare."""
    examples = stream.take(run.config.batch.prompts * run.config.batch.oversample)
    prompts = encode.encode_prompts(examples, run.tokenizer, run.width)
    return Query(examples, prompts, rewards.Groups(scorer, examples, run.tokenizer))


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


Lengths = tuple[np.ndarray, np.ndarray]  # tokens of a row's prompt and of its completion, i[B]


def _lengths(run: Settings, query: Query, ends: Ends) -> Lengths:
    return np.repeat(query.prompts.length, run.config.batch.group_size), ends.length


def _layouts(engine: Any, lengths: list[Lengths], parts: int) -> list[Any]:
    """Where the rows of each minibatch are packed, one for all of the engine's runs, or None."""
    run = engine.runs[0]
    if run.packing is None:
        return [None] * parts
    width = run.width + run.max_new_tokens
    split = [tuple(np.split(x, parts) for x in own) for own in lengths]
    return [
        engine.join([learner.plan(p[i], c[i], width, run.packing) for p, c in split])
        for i in range(parts)
    ]


def _packed(engine: Any, batches: tuple[Batch, ...], layouts: list[Any]) -> tuple[Batch, ...]:
    if layouts[0] is None:
        return batches
    pack = partial(engine.call, learner.pack, mesh=engine.runs[0].mesh)
    return tuple(map(pack, batches, layouts))


def _scored(bundle: Bundle, batch: Batch, lengths: list[Lengths]) -> tuple[Batch, ...]:
    """Minibatches with the log-probabilities, and the routing, that their update needs.

    Of all prompts, also where more were drawn than are learnt from: that is not known yet.
    """
    engine, run, params = bundle.engine, bundle.engine.runs[0], bundle.state.params
    hp, sizes, frozen = engine.hp, run.config.batch, bundle.frozen
    replays = hp.static.routing_replay == "R2"
    recomputes = run.config.learner.old_logp == "recompute"
    parts = sizes.minibatches * sizes.oversample
    minibatches = engine.call(learner.split_rows, batch, parts=parts, mesh=run.mesh)
    if not (replays or recomputes or bundle.reference is not None):
        return minibatches

    def with_logp(batch, layout):
        (rows,), found = _packed(engine, (batch,), [layout]), {}
        if replays:
            scored = engine.call(learner.score_routing, params, rows, hp, frozen)
            found["old_logp"], found["routing"] = scored
        elif recomputes:
            found["old_logp"] = engine.call(learner.score, params, rows, hp, frozen)
        if bundle.reference is not None:
            shape = dataclasses.replace(run.model, lora_targets=())  # the base without adapters
            own = hp.replace(routing_replay="none", model=shape)
            found["ref_logp"] = engine.call(learner.score, bundle.reference, rows, own, frozen)
        if layout is not None:
            found = engine.call(learner.unpack, found, layout, mesh=run.mesh)
        return batch.replace(**found)

    layouts = _layouts(engine, lengths, parts)
    return tuple(map(with_logp, minibatches, layouts))


def _selected(run: Settings, rewards_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
    """Which rows to learn from, whether their groups have a signal, and metrics of that."""
    sizes = run.config.batch
    if sizes.oversample == 1:
        return np.arange(len(rewards_B), dtype=np.int32), np.ones(len(rewards_B), bool), {}
    controls = sizes.group_size, sizes.prompts, sizes.minibatches
    rows_B, signal_B = advantages.informative(rewards_B, *controls)
    return rows_B, signal_B, {"advantage/kept_groups": float(signal_B.mean())}


def _metrics(run: Settings, prompts: Prompts, ends: Ends, rewards_B: np.ndarray) -> dict:
    """What a judged rollout of a run shows; of a mixture, the mean reward of each task too."""
    (length_B, finished_B, computed), group_size = ends, run.config.batch.group_size
    rewards_PG = rewards_B.reshape(-1, group_size)
    metrics = {
        "reward/mean": float(rewards_B.mean()),
        "reward/std": float(rewards_B.std()),
        "advantage/zero_groups": float(np.mean(rewards_PG.max(-1) == rewards_PG.min(-1))),
        "length/mean": float(length_B.mean()),
        "length/max": float(length_B.max()),
        "length/truncated": float(np.mean(finished_B == LENGTH)),
        "sampler/rows_per_token": float(computed / max(1, length_B.sum())),
    }
    if len(run.tasks) > 1:
        task_B = np.repeat(prompts.task, group_size)
        for k, name in enumerate(run.tasks):
            metrics[f"reward/{name}"] = float(rewards_B[task_B == k].mean())
    return metrics


def _samples(
    run: Settings, query: Query, finished_B, rewards_B, advantages_B, iteration: int
) -> list[dict]:
    """The first two completions of as many prompts as the log takes, of those sampled here."""
    size, count = run.config.batch.group_size, run.config.log.samples
    texts = query.groups.texts(size)
    first = (i for i, text in enumerate(texts) if i % size < 2 and text is not None)
    return [
        {
            "iteration": iteration,
            "prompt_id": query.examples[i // size].id,
            "sample_index": i % size,
            "prompt": query.examples[i // size].prompt,
            "completion": texts[i],
            "answer": query.examples[i // size].answer,
            "reward": float(rewards_B[i]),
            "advantage": float(advantages_B[i]),
            "finished": int(finished_B[i]),
        }
        for i in itertools.islice(first, count)
    ]


def from_rollout(
    bundle: Bundle,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> Callable[[], Experience]:
    """Sample and score; what comes back waits for the verdicts and attaches advantages."""
    engine, params = bundle.engine, bundle.state.params
    pairs = zip(engine.runs, bundle.streams, strict=True)
    queries = [next_query(run, stream, scorer) for run, stream in pairs]
    with clock("to_sampler"):
        weights = jax.block_until_ready(engine.to_sampler(params, bundle.frozen))
    moved = float(sampler.moved_bytes((params, bundle.frozen), weights) / len(queries))
    with clock("rollout"):
        prompts, groups = ([getattr(q, name) for q in queries] for name in ("prompts", "groups"))
        controls = {"iteration": iteration, "warm_up": warm_up, "on_segment": clock.check}
        rollout, ends = engine.rollout(weights, prompts, groups, **controls)
    with clock("logp"):  # needs no rewards: the device works while rows are judged
        lengths = list(map(_lengths, engine.runs, queries, ends))
        batch = engine.rows(engine.call(batch_of, rollout))
        scored = _scored(bundle, batch, lengths)
    return partial(_judged, bundle, queries, scored, ends, lengths, moved, iteration, clock)


def _judged(
    bundle: Bundle,
    queries: list[Query],
    scored: tuple[Batch, ...],
    ends: list[Ends],
    lengths: list[Lengths],
    moved: float,
    iteration: int,
    clock: Clock,
) -> Experience:
    engine, runs, c = bundle.engine, bundle.engine.runs, bundle.engine.runs[0].config
    with clock("score_exposed"):
        verdicts = [q.groups.wait() for q in queries]
    clock.add("score", sum(v.seconds for each in verdicts for v in each))
    found = [rewards.combine([v.parts for v in each], runs[0].recipe) for each in verdicts]
    rewards_RB = [rewards_B for rewards_B, _ in found]
    chosen = [_selected(runs[0], rewards_B) for rewards_B in rewards_RB]
    with clock("logp"):
        rows_B, signal_B = (engine.join([each[i] for each in chosen]) for i in (0, 1))
        pairs = zip(rewards_RB, chosen, strict=True)
        minibatches, more = engine.call(
            learner.make_minibatches,
            engine.call(learner.select_rows, scored, rows_B, signal_B, mesh=runs[0].mesh),
            engine.join([rewards_B[own_B] for rewards_B, (own_B, *_) in pairs]),
            engine.join([run.config.reward.kl_coef for run in runs]),
            engine.join([run.bounds for run in runs]),
            estimator=c.advantages,
            group_size=c.batch.group_size,
            kl=c.reward.kl,
            correction=c.correction.name,
            parts=c.batch.minibatches,
            mesh=runs[0].mesh,
        )
        learnt = engine.to_host([b.advantages for b in minibatches])
        more = engine.to_host(more)
        # Rows without a signal are not computed at all.
        of_chosen = [
            tuple(np.where(signal_B, x[rows_B], 0) for x in own)
            for own, (rows_B, signal_B, _) in zip(lengths, chosen, strict=True)
        ]
        layouts = _layouts(engine, of_chosen, len(minibatches))
        minibatches = _packed(engine, minibatches, layouts)
    metrics, samples = [], []
    for r, (run, query, stream) in enumerate(zip(runs, queries, bundle.streams, strict=True)):
        (rewards_B, parts), (rows_B, _, of_groups) = found[r], chosen[r]
        advantages_B = np.zeros_like(rewards_B)
        advantages_B[rows_B] = np.concatenate(learnt[r])
        own = _metrics(run, query.prompts, ends[r], rewards_B)
        own |= {"data/dropped": float(stream.dropped), **parts, **of_groups}
        own["sampler/weights_moved_bytes"] = moved
        metrics.append(own | {key: float(value) for key, value in more[r].items()})
        samples.append(_samples(run, query, ends[r].finished, rewards_B, advantages_B, iteration))
    return Experience(minibatches, metrics, samples)


def from_demonstrations(
    bundle: Bundle,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
) -> Callable[[], Experience]:
    """Worked answers as minibatches; nothing is sampled."""
    del iteration, scorer, warm_up
    engine, first = bundle.engine, bundle.engine.runs[0]
    batches, metrics, lengths = [], [], []
    with clock("rollout"):
        for run, stream in zip(engine.runs, bundle.streams, strict=True):
            width, examples = run.width + run.max_new_tokens, stream.take(run.rows)
            batch = encode.encode_demonstrations(examples, run.tokenizer, width)
            length = {"length/mean": float(batch.mask.sum(-1).mean())}
            metrics.append(length | {"data/dropped": float(stream.dropped)})
            batches.append(batch)
            tokens_B = (batch.segments > 0).sum(-1)
            lengths.append((tokens_B - batch.mask.sum(-1), batch.mask.sum(-1)))
        batch = engine.rows(engine.join(batches))
        parts = first.config.batch.minibatches
        minibatches = engine.call(learner.split_rows, batch, parts=parts, mesh=first.mesh)
        minibatches = _packed(engine, minibatches, _layouts(engine, lengths, parts))
    return lambda: Experience(minibatches, metrics, [[] for _ in metrics])


SOURCES: dict[str, Any] = {"rollout": from_rollout, "demonstrations": from_demonstrations}
