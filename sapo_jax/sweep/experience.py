"""What a cohort's runs learn from, and their evaluation: `experience` for R runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sapo_jax import rewards, sampler
from sapo_jax.data import encode
from sapo_jax.data import stream as streams
from sapo_jax.sampler import sampling
from sapo_jax.sweep import population, vectorize
from sapo_jax.sweep.cohorts import Cohort
from sapo_jax.sweep.vectorize import pick, stack
from sapo_jax.training import evaluation, experience
from sapo_jax.training.progress import Clock
from sapo_jax.types import Batch, Prompts, Rollout


class Experience(NamedTuple):
    """Minibatches of R runs, and of each run its metrics and rows for a person to read."""

    minibatches: tuple[Batch, ...]
    metrics: list[dict[str, float]]
    samples: list[list[dict]]


def sample(
    cohort: Cohort,
    live_R: np.ndarray,
    weights: Any,
    prompts: Prompts,
    *,
    iteration: int,
    domain: str = "train",
) -> Rollout:
    """Rollouts with the runs' settings; the domain "eval" takes those of the evaluation."""
    run, options = cohort.lead, cohort.lead.config.eval
    evaluates = domain == "eval"
    temperatures = [c.config.sampler.temperature for c in cohort.runs]
    if evaluates:
        temperatures = [c.config.eval.temperature for c in cohort.runs]
    top = {name: getattr(options, name) if evaluates else None for name in ("top_k", "top_p")}
    seed_R = np.array([c.config.seed for c in cohort.runs], np.uint32)
    return population.rollout(
        live_R,
        weights,
        run.model,
        prompts,
        population.base_keys(seed_R, domain, np.int32(iteration)),
        stack([sampling.controls(t, **top) for t in temperatures]),
        np.int32(iteration),
        group_size=options.samples if evaluates else run.config.batch.group_size,
        max_new_tokens=run.max_new_tokens,
        cache=(run.eval_plan if evaluates else run.plan).cache,
        truncate=any(value is not None for value in top.values()),
        method=cohort.method,
    )


def _scored(
    cohort: Cohort, live_R: np.ndarray, params: Any, reference: Any, batch: Batch
) -> tuple[Batch, ...]:
    """As `experience` does for one run."""
    c, hp, method = cohort.lead.config, cohort.hp, cohort.method
    parts = c.batch.minibatches * c.batch.oversample
    minibatches = population.split_rows(live_R, batch, parts=parts, method=method)
    score = partial(population.score, live_R, method=method)
    if hp.static.routing_replay == "R2":
        routed = partial(population.score_routing, live_R, params, hp=hp, method=method)
        pairs = [(b, *routed(b)) for b in minibatches]
        minibatches = tuple(b.replace(old_logp=logp, routing=r) for b, logp, r in pairs)
    elif c.learner.old_logp == "recompute":
        minibatches = tuple(b.replace(old_logp=score(params, b, hp)) for b in minibatches)
    if reference is not None:
        hp = hp.replace(routing_replay="none")
        minibatches = tuple(b.replace(ref_logp=score(reference, b, hp)) for b in minibatches)
    return minibatches


@partial(jax.jit, static_argnames="method")
def _batch_of(live_R: jax.Array, rollout: Rollout, *, method: str) -> Batch:
    return vectorize.over(method, live_R, experience.batch_of, rollout)


def from_rollout(
    cohort: Cohort,
    live_R: np.ndarray,
    params: Any,
    reference: Any,
    read: Sequence[streams.Stream],
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
) -> Experience:
    """Sample, judge, and attach what the objectives need, as `experience.from_rollout`.

    All R·B rows are judged when they all are there: one program samples them.
    """
    members, method = cohort.runs, cohort.method
    group_size = cohort.lead.config.batch.group_size
    asked = [experience.ask(run, stream, scorer) for run, stream in zip(members, read, strict=True)]
    with clock("to_sampler"):
        weights = population.to_sampler(live_R, params, cohort.lead.model, method=method)
        weights = jax.block_until_ready(weights)
    with clock("rollout"):
        prompts = stack([one.prompts for one in asked])
        rollout = sample(cohort, live_R, weights, prompts, iteration=iteration)
        on_host = jax.device_get(rollout)
        ends = on_host.mask.sum(-1), on_host.finished
    for r, one in enumerate(asked):
        hand_over(one.groups, pick(on_host, r), group_size)
    with clock("update"):  # needs no rewards: the device works while rows are judged
        minibatches = _scored(
            cohort, live_R, params, reference, _batch_of(live_R, rollout, method=method)
        )
    with clock("score_exposed"):
        verdicts = [one.groups.wait() for one in asked]
    clock.add("score", sum(v.seconds for each in verdicts for v in each))
    with clock("update"):
        judged = [
            rewards.combine([v.parts for v in each], run.recipe)
            for run, each in zip(members, verdicts, strict=True)
        ]
        kept = [experience.kept(run, x) for run, (x, _) in zip(members, judged, strict=True)]
        rows_RB = np.stack([rows_B for rows_B, _, _ in kept])
        minibatches, more = population.learn_from(
            live_R,
            minibatches,
            rows_RB,
            np.stack([signal_B for _, signal_B, _ in kept]),
            np.stack([x[rows_B] for (x, _), rows_B in zip(judged, rows_RB, strict=True)]),
            np.array([run.config.reward.kl_coef for run in members], np.float32),
            vectorize.values([run.bounds for run in members]),
            method=method,
            **experience.recipe_of(cohort.lead),
        )
        learnt_RB = np.concatenate([b.advantages for b in minibatches], 1)
        more = jax.device_get(more)
    moved = float(sampler.moved_bytes(params, weights) / len(members))
    metrics, samples = [], []
    for r, (run, one, (rewards_B, parts)) in enumerate(zip(members, asked, judged, strict=True)):
        advantages_B = np.zeros_like(rewards_B)
        advantages_B[rows_RB[r]] = learnt_RB[r]
        found, rows = experience.told(run, one, pick(ends, r), rewards_B, advantages_B, iteration)
        found |= {"data/dropped": float(read[r].dropped), **parts, **kept[r][2]}
        found["sampler/weights_moved_bytes"] = moved
        metrics.append(found | {key: float(value[r]) for key, value in more.items()})
        samples.append(rows)
    return Experience(minibatches, metrics, samples)


def from_demonstrations(
    cohort: Cohort,
    live_R: np.ndarray,
    params: Any,
    reference: Any,
    read: Sequence[streams.Stream],
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
) -> Experience:
    """Worked answers as minibatches; nothing is sampled."""
    del live_R, params, reference
    one = partial(experience.SOURCES["demonstrations"], params=None, reference=None)
    each = [
        one(run, stream=stream, iteration=iteration, clock=clock, scorer=scorer)
        for run, stream in zip(cohort.runs, read, strict=True)
    ]
    minibatches = stack([e.minibatches for e in each])
    return Experience(minibatches, [e.metrics for e in each], [e.samples for e in each])


SOURCES = {"rollout": from_rollout, "demonstrations": from_demonstrations}


def hand_over(groups: rewards.Groups, rollout: Rollout, group_size: int) -> None:
    """Have all completions of a rollout on the host judged."""
    tokens_BS, count_B = rollout.tokens, rollout.mask.sum(-1)
    start_B = rollout.mask.argmax(-1)
    index_BT = start_B[:, None] + np.arange(max(1, count_B.max()))
    index_BT = np.minimum(index_BT, tokens_BS.shape[1] - 1)
    completions_BT = np.take_along_axis(tokens_BS, index_BT, 1)
    columns = (completions_BT, count_B, rollout.finished)
    grouped = [x.reshape(-1, group_size, *x.shape[1:]) for x in columns]
    groups(np.arange(len(grouped[0])), *grouped)


def held_out(
    cohort: Cohort, live_R: np.ndarray, params: Any, scorer: rewards.Scorer
) -> list[dict[str, float]]:
    """`evaluation.held_out` of R runs: one evaluation set, each run's own noise."""
    run, options = cohort.lead, cohort.lead.config.eval
    examples, size = evaluation.test_set(run, options.prompts), run.eval_batch
    weights = population.to_sampler(live_R, params, run.model, method=cohort.method)
    draw_all = partial(sample, cohort, live_R, weights, iteration=0, domain="eval")
    drawn = []
    for start in range(0, len(examples), size):
        batch = (examples[start : start + size] * size)[:size]
        prompts = encode.encode_prompts(batch, run.tokenizer, run.width)
        every = stack([prompts] * len(cohort.runs))
        drawn.append(jax.device_get(draw_all(every)))

    def replay(r):
        parts = iter(drawn)

        def draw(prompts, on_groups):
            del prompts  # drawn in this order before
            rollout = pick(next(parts), r)
            hand_over(on_groups, rollout, options.samples)
            return rollout

        return draw

    return [
        evaluation.evaluated(one, replay(r), scorer, examples) for r, one in enumerate(cohort.runs)
    ]
