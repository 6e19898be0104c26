"""One jitted update of the policy, and an iteration's updates as plain numbers.

`update(state, batch, hp)` is one program for every value of the traced hyperparameters; what
shapes it (the model, the micro-batches, the optimizer's schedule) is static in ``hp``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from sapo_jax import masked
from sapo_jax.learner.diagnostics import OFF_POLICY, STATIONS, quantiles
from sapo_jax.learner.gradients import divided, numerators
from sapo_jax.learner.optimizer import Hyperparameters, learning_rate, optimizer, partition_specs
from sapo_jax.parallel import sharding
from sapo_jax.types import (
    Batch,
    Effective,
    Frozen,
    Histogram,
    Max,
    TrainState,
    Weighted,
    merge,
)


@partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, batch: Batch, hp: Hyperparameters, frozen: Frozen | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on one minibatch; none where no token counts, or a number is not finite.

    Args:
      state: donated; use the one that comes back.
      batch: rows whose number ``micro_batches`` divides.
      hp: hyperparameters.
      frozen: with LoRA, the base of the adapters in ``state``.

    Returns:
      (state, metrics): metrics as mergeable reductions, see `masked`.
    """
    chex.assert_equal_shape([batch.tokens, batch.mask, batch.segments, batch.old_logp])
    parts = hp.static.micro_batches * sharding.parts(hp.static.mesh)
    chex.assert_is_divisible(batch.tokens.shape[0], parts)
    sums, terms = numerators(state.params, batch, hp.at(state.iteration), frozen)
    grads = divided(sums, terms)
    rate, norm = learning_rate(hp, state.update), optax.tree.norm(grads)
    late = ~jnp.isfinite(jnp.stack([masked.ratio(terms["loss"]), norm]))
    bad = jnp.concatenate([terms["nonfinite"].value, late.astype(jnp.float32)])

    def move(state):
        step = optimizer(hp, rate)
        grads = divided(sums, terms)  # again: in one fusion with what follows
        updates, opt_state = step.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        after = state.replace(update=state.update + 1, params=params, opt_state=opt_state)
        return after, optax.tree.norm(updates)

    # One NaN would be in every parameter and moment for good; without a token, moments and decay
    # would still move the parameters.
    counted = terms["loss"].denominator > 0
    skip = bad.any() | ~counted
    state, moved = jax.lax.cond(skip, lambda state: (state, jnp.zeros_like(norm)), move, state)
    one = counted.astype(jnp.float32)
    metrics = {
        **terms,
        "nonfinite": Max(bad),  # by diagnostics.STATIONS
        "grad/norm": Weighted(norm, one),
        "grad/update_norm": Weighted(moved, one),
        "learning_rate": Weighted(rate * one, one),
    }
    return sharding.constrain(state, hp.static.mesh, partition_specs(hp)), metrics


@jax.jit
def finish_iteration(metrics: tuple) -> tuple[dict, list[dict]]:
    """Metrics of an iteration, merged over its minibatches, and those of each minibatch.

    The sampler's gap is that of the first minibatch: the others compare the sampler with a policy
    that has moved on. What is OFF_POLICY is of those others, if there are any.

    Where no token was counted, or none of its kind, a mean is NaN: 0 would read as a measurement.
    """

    def value(x):
        nothing = {Weighted: "denominator", Effective: "count"}.get(type(x))
        if nothing is None:
            return masked.value(x)
        return jnp.where(getattr(x, nothing) == 0, jnp.nan, masked.value(x))

    def values(terms):
        found = {key: value(x) for key, x in quantiles(terms).items()}
        return {"policy/loss": found.pop("loss"), **found}

    def of(prefixes, metrics):
        return {k: v for k, v in metrics.items() if k.startswith(prefixes)}

    def merged(metrics):
        return values(merge(jax.tree.map(lambda *x: jnp.stack(x), *metrics)))

    each = [values(m) for m in metrics]
    late = merged(metrics[1:] or metrics)
    return merged(metrics) | of("sampler/", each[0]) | of(OFF_POLICY, late), each


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return {"edges": value.edges.tolist(), "counts": value.counts.tolist()}
    return float(value)


def record(update: int, merged: dict, each: list[dict]) -> dict[str, Any]:
    """An iteration on the host, as plain numbers and lists; the other arguments are what
    `finish_iteration` gives.

    Each minibatch says whether its update was skipped, and what was the first that was not finite.
    """
    keys = [k for k in each[0] if k.startswith(("policy/", "grad/", "ratio/", "coefficient/"))]
    minibatches = []
    for found in each:
        bad = [name for name, at in zip(STATIONS, found["nonfinite"], strict=True) if at]
        first = {"update/nonfinite": bad[0]} if bad else {}
        minibatches.append({k: float(found[k]) for k in keys} | first)
    skipped = sum("update/nonfinite" in m for m in minibatches)
    whole = {k: _plain(v) for k, v in merged.items() if k != "nonfinite"}
    return whole | {"update": int(update), "update/skipped": skipped, "minibatch": minibatches}


end_iteration = jax.jit(lambda s: s.replace(iteration=s.iteration + 1), donate_argnums=0)


def learn(
    state: TrainState,
    minibatches: tuple[Batch, ...],
    hp: Hyperparameters,
    frozen: Frozen | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """An iteration's updates, one for each minibatch.

    Returns:
      (state, record): plain numbers of the iteration, histograms as edges and counts, and under
      "minibatch" the numbers of each update.
    """
    collected = []
    for batch in minibatches:
        state, metrics = update(state, batch, hp, frozen)
        collected.append(metrics)
    found = sharding.to_host((state.update, *finish_iteration(tuple(collected))))
    return end_iteration(state), record(*found)
