"""What an iteration learns from: sampled and judged completions, or worked demonstrations.

A source starts an iteration of an engine's runs and returns a function that finishes it, so that
another engine can sample while the rows of this one are judged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import advantages, learner, rewards, sampler
from sapo_jax.data import encode
from sapo_jax.data.stream import Stream
from sapo_jax.model import images
from sapo_jax.parallel import sharding
from sapo_jax.tasks.base import Example
from sapo_jax.training.carry import Carry, done, lags_of
from sapo_jax.training.engine import Bundle, Ends, copied
from sapo_jax.training.progress import Clock
from sapo_jax.training.queue import Experience
from sapo_jax.training.scoring import Lengths, layouts_of, packed, scored
from sapo_jax.training.settings import Settings
from sapo_jax.types import LENGTH, Batch, Prompts, Rollout


class Query(NamedTuple):
    """The prompts of an iteration of a run, and what judges their completions."""

    examples: list[Example]
    prompts: Prompts
    groups: rewards.Groups
    dropped: int  # see `Stream.dropped`
    begun: int = 0  # tokens of completions that go on


def open_stream(run: Settings, *, workers: int = 0) -> Stream:
    """The training examples from the beginning, in the order of the run's seed."""
    sources, seed = run.sources("train"), run.config.seed
    return Stream(sources, seed, shares=run.shares, keep=run.keep, workers=workers)


def next_query(
    run: Settings,
    stream: Stream,
    scorer: rewards.Scorer,
    iteration: int = 0,
    carry: Carry | None = None,
) -> Query:
    """The next prompts, more than P where some are spare; those that go on keep their places."""
    places = carry.places if carry else [None] * run.drawn
    examples, numbers = stream.fill([place and place["read"] for place in places])
    examples = encode.swapped(examples) if run.config.data.swap_images else examples
    prompts = encode.encode_prompts(examples, run.tokenizer, run.width, run.images)
    groups = rewards.Groups(scorer, examples, run.tokenizer)
    if carry is None:
        return Query(examples, prompts, groups, stream.dropped)
    begun = int(carry.tokens.sum())
    prompts = carry.drawn(prompts, numbers, iteration)
    return Query(examples, prompts, groups, stream.dropped, begun)


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
        images=rollout.images,
    )


def _lengths(run: Settings, query: Query, ends: Ends) -> Lengths:
    """Of the rows that are done; the others are not computed."""
    done_B = done(run, ends.finished)
    prompt_B = np.repeat(query.prompts.length, run.config.batch.group_size)
    return np.where(done_B, prompt_B, 0), np.where(done_B, ends.length, 0)


def _selected(
    run: Settings, rewards_B: np.ndarray, done_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Which rows to learn from, whether their groups have a signal, and metrics of that."""
    sizes = run.config.batch
    if sizes.oversample == 1:
        return np.arange(len(rewards_B), dtype=np.int32), done_B, {}
    controls = sizes.group_size, sizes.prompts, sizes.minibatches
    rows_B, signal_B = advantages.informative(rewards_B, *controls)
    return rows_B, signal_B, {"advantage/kept_groups": float(signal_B.mean())}


def _metrics(run: Settings, query: Query, ends: Ends, rewards_B: np.ndarray) -> dict:
    """What a judged rollout of a run shows; of a mixture, the mean reward of each task too.

    Of the groups that are done, but for what is the sampler's; NaN where none is.
    """
    done_B, group_size = done(run, ends.finished), run.config.batch.group_size
    some_B = done_B if done_B.any() else ~done_B
    length_B, finished_B, rewards_B = (x[some_B] for x in (*ends[:2], rewards_B))
    rewards_PG = rewards_B.reshape(-1, group_size)
    metrics = {
        "reward/mean": float(rewards_B.mean()),
        "reward/std": float(rewards_B.std()),
        "advantage/zero_groups": float(np.mean(rewards_PG.max(-1) == rewards_PG.min(-1))),
        "length/mean": float(length_B.mean()),
        "length/max": float(length_B.max()),
        "length/truncated": float(np.mean(finished_B == LENGTH)),
    }
    if len(run.tasks) > 1:
        task_B = np.repeat(query.prompts.task, group_size)[some_B]
        for k, name in enumerate(run.tasks):
            own = rewards_B[task_B == k]
            metrics[f"reward/{name}"] = float(own.mean()) if len(own) else math.nan
    if not done_B.any():
        metrics = dict.fromkeys(metrics, math.nan)
    if run.config.sampler.budget:
        metrics["sampler/goes_on"] = float(1 - done_B.mean())
    sampled = max(1, ends.length.sum() - query.begun)
    return metrics | {"sampler/rows_per_token": float(ends.computed / sampled)}


def _samples(
    run: Settings, query: Query, finished_B, right_B, rewards_B, advantages_B, when: dict[str, int]
) -> list[dict]:
    """Two completions of as many prompts as the log takes, of those sampled here.

    First a right and a wrong one of each prompt that has both, then the first two of others.
    """
    size, count = run.config.batch.group_size, run.config.log.samples
    texts, ranked = query.groups.texts(size), []
    count_P = right_B.reshape(-1, size).sum(-1)
    for p in (p for p in range(len(count_P)) if texts[p * size] is not None):
        right_G, one_sided = right_B[p * size : (p + 1) * size], count_P[p] in (0, size)
        pair = range(min(2, size)) if one_sided else (right_G.argmin(), right_G.argmax())
        ranked += [(one_sided, p * size + int(i)) for i in sorted(pair)]
    return [
        {
            **when,
            "prompt_id": e.id,
            "sample_index": i % size,
            "prompt": e.prompt,
            "completion": texts[i],
            "answer": e.answer,
            **({"images": list(map(images.thumbnail, e.images))} if e.images else {}),
            "reward": float(rewards_B[i]),
            "advantage": float(advantages_B[i]),
            "finished": int(finished_B[i]),
            "right": bool(right_B[i]),
            "group_right": int(count_P[i // size]),
            "group_size": size,
        }
        for i in sorted(i for _, i in sorted(ranked)[:count])
        for e in [query.examples[i // size]]
    ]


def from_rollout(
    bundle: Bundle,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
    *,
    policy_step: int | None = None,
    apart: bool = False,
) -> Callable[[], Experience]:
    """Sample and score; what comes back waits for the verdicts and attaches advantages.

    Args:
      bundle: the runs.
      iteration: which learns from it.
      clock, scorer: of the loop.
      warm_up: see `sampler.rollout`.
      policy_step: the iteration that samples, if it is an earlier one.
      apart: sample in a thread, on the sampler's own devices; what comes back waits for it, too.
    """
    engine, params = bundle.engine, bundle.state.params
    pairs = zip(engine.runs, bundle.streams, strict=True)
    queries = [next_query(*pair, scorer, iteration, bundle.carry) for pair in pairs]
    with clock("to_sampler"):
        weights = jax.block_until_ready(engine.to_sampler(params, bundle.frozen))
    places = max(len(queries), sharding.runs(engine.runs[0].mesh))  # some may have no run
    moved = sampler.moved_bytes((params, bundle.frozen), weights) / places
    when = {"iteration": iteration, "policy_step": policy_step or iteration}

    def sampled():
        prompts, groups = ([getattr(q, name) for q in queries] for name in ("prompts", "groups"))
        controls = {"warm_up": warm_up, "carry": bundle.carry, **when}
        with clock("rollout"):
            return engine.rollout(weights, prompts, groups, on_segment=clock.check, **controls)

    def finish(rollout, ends):
        with clock("logp"):  # needs no rewards: the device works while rows are judged
            lengths = list(map(_lengths, engine.runs, queries, ends))
            if engine.runs[0].model.train_vision and rollout.images is not None:
                patches = engine.join([query.prompts.images for query in queries])
                rollout = rollout.replace(images=engine.rows(patches))
            batch = engine.rows(engine.call(batch_of, rollout))
            minibatches, lags = scored(bundle, batch, lengths), None
            if bundle.carry is not None:
                lags = lags_of(rollout, np.int32(when["policy_step"]))
        rows = queries, minibatches, ends, lengths, lags
        return partial(_judged, bundle, *rows, moved, when, clock)

    if not apart:
        return finish(*sampled())
    if engine.runs[0].config.learner.old_logp == "recompute":  # updates take the buffers meanwhile
        copy = copied(params)
        bundle = bundle._replace(state=bundle.state.replace(params=copy))
    thread = futures.ThreadPoolExecutor(1)
    under_way = thread.submit(sampled)
    thread.shutdown(wait=False)
    return lambda: finish(*under_way.result())()


def _judged(
    bundle: Bundle,
    queries: list[Query],
    rows: tuple[Batch, ...],
    ends: list[Ends],
    lengths: list[Lengths],
    lags: jax.Array | None,
    moved: float,
    when: dict[str, int],
    clock: Clock,
) -> Experience:
    engine, runs, c = bundle.engine, bundle.engine.runs, bundle.engine.runs[0].config
    with clock("score_exposed"):
        verdicts = [q.groups.wait(c.batch.group_size) for q in queries]
    clock.add("score", sum(v.seconds for each in verdicts for v in each))
    parts_RB, recipe = [[v.parts for v in each] for each in verdicts], runs[0].recipe
    rewards_RB = [rewards.combine(parts_B, recipe)[0] for parts_B in parts_RB]
    done_RB = [done(runs[0], own.finished) for own in ends]
    chosen = [_selected(runs[0], *pair) for pair in zip(rewards_RB, done_RB, strict=True)]
    with clock("logp"):
        rows_B, signal_B = (engine.join([each[i] for each in chosen]) for i in (0, 1))
        pairs = zip(rewards_RB, chosen, strict=True)
        minibatches, more = engine.call(
            learner.make_minibatches,
            engine.call(learner.select_rows, rows, rows_B, signal_B, mesh=runs[0].mesh),
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
        layouts = layouts_of(engine, of_chosen, len(minibatches))
        minibatches = packed(engine, minibatches, layouts)
    metrics, samples, steps = [], [], []
    for r, (run, query) in enumerate(zip(runs, queries, strict=True)):
        rewards_B, (rows_B, signal_B, of_groups) = rewards_RB[r], chosen[r]
        ended = list(itertools.compress(parts_RB[r], done_RB[r]))
        parts = rewards.combine(ended, recipe)[1]
        parts = parts if ended else dict.fromkeys(parts, math.nan)
        advantages_B = np.zeros_like(rewards_B)
        advantages_B[rows_B] = np.concatenate(learnt[r])
        own = _metrics(run, query, ends[r], rewards_B)
        own |= {"data/dropped": float(query.dropped), **parts, **of_groups}
        own["sampler/weights_moved_bytes"] = moved
        metrics.append(own | {key: float(value) for key, value in more[r].items()})
        right_B = np.array([part["accuracy"] == 1 for part in parts_RB[r]])
        columns = ends[r].finished, right_B, rewards_B, advantages_B
        samples.append(_samples(run, query, *columns, when))
        now, count_A = when["policy_step"], np.array([of_chosen[r][1].sum()])
        if lags is not None:
            count_A = sharding.to_host(lags)[rows_B][signal_B].sum(0)
        steps.append([(now - age, int(n)) for age, n in enumerate(count_A) if n])
    return Experience(minibatches, metrics, samples, steps)


def from_demonstrations(
    bundle: Bundle,
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    warm_up: Callable[[str], None] | None = None,
    **controls: Any,
) -> Callable[[], Experience]:
    """Worked answers as minibatches; nothing is sampled."""
    del iteration, scorer, warm_up, controls
    engine, first = bundle.engine, bundle.engine.runs[0]
    batches, metrics, lengths = [], [], []
    with clock("rollout"):
        for run, stream in zip(engine.runs, bundle.streams, strict=True):
            width, examples = run.width + run.max_new_tokens, stream.take(run.rows)
            examples = encode.swapped(examples) if run.config.data.swap_images else examples
            batch = encode.encode_demonstrations(examples, run.tokenizer, width, run.images)
            length = {"length/mean": float(batch.mask.sum(-1).mean())}
            metrics.append(length | {"data/dropped": float(stream.dropped)})
            batches.append(batch)
            tokens_B = (batch.segments > 0).sum(-1)
            lengths.append((tokens_B - batch.mask.sum(-1), batch.mask.sum(-1)))
        batch = engine.rows(engine.join(batches))
        parts = first.config.batch.minibatches
        minibatches = engine.call(learner.split_rows, batch, parts=parts, mesh=first.mesh)
        minibatches = packed(engine, minibatches, layouts_of(engine, lengths, parts))
    nothing = [[] for _ in metrics], [None for _ in metrics]
    return lambda: Experience(minibatches, metrics, *nothing)


SOURCES: dict[str, Any] = {"rollout": from_rollout, "demonstrations": from_demonstrations}
