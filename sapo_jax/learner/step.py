"""The learner: one jitted update of the policy, and the scoring that shares its log π.

`update(state, batch, hp)` is one program for every value of the traced hyperparameters; what
shapes it (the model, the micro-batches, the optimizer's schedule) is static in ``hp``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from sapo_jax import masked, model, objectives
from sapo_jax.learner import diagnostics
from sapo_jax.learner.diagnostics import STATIONS
from sapo_jax.learner.optimizer import Hyperparameters, learning_rate, optimizer, partition_specs
from sapo_jax.model import head, routing, segments, transformer
from sapo_jax.parallel import collectives, sharding
from sapo_jax.types import (
    Batch,
    Histogram,
    Max,
    TrainState,
    Weighted,
    add,
    is_reduction,
    merge,
    zero,
)


def _head(params: Any, batch: Batch, hp: Hyperparameters) -> tuple[tuple, routing.Summary | None]:
    """The arguments of `head`'s functions, and what the routers did (None in a dense model)."""
    static, config, replay = hp.static, hp.static.model, None
    if static.routing_replay != "none" and config.num_experts:
        if batch.routing is None:
            raise ValueError(f"routing_replay={static.routing_replay!r}: the batch has no routing")
        replay = batch.routing
    params = model.params.all_gather(params, model.params.table(config), config)
    hidden_BSD, summary = transformer.hidden(
        params, config, batch.tokens, batch.segments, remat=static.remat, prefix_BS=batch.prefix,
        replay_BSLk=replay, summarise=lambda r: routing.summarise(r, _counts(batch), config),
    )  # fmt: skip
    rows, width = batch.tokens.shape
    before_BS = segments.predecessors(batch.segments, batch.prefix)
    source_BS = before_BS + width * jnp.arange(rows, dtype=jnp.int32)[:, None]
    mask_BS = batch.mask.at[:, 0].set(False)  # nothing predicts a row's first token
    tokens = head.Tokens(*(x.reshape(-1) for x in (batch.tokens, source_BS, mask_BS)))
    weight_VD = model.params.head_weight(params)
    hidden_XD = hidden_BSD.reshape(-1, config.hidden_size)
    return (hidden_XD, weight_VD, tokens, jnp.float32(hp.temperature), static.head_chunk), summary


def _counts(batch: Batch) -> jax.Array:
    return segments.multiplicity(batch.segments, batch.prefix)


def forward(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[jax.Array, jax.Array, routing.Summary | None]:
    """log π and entropy of the tokens under the mask, and what the routers did.

    Returns:
      (f32[B, S], f32[B, S], summary): 0 outside the mask; no summary of a dense model.
    """
    arguments, summary = _head(params, batch, hp)
    logp_T, entropy_T = head.logp_entropy(*arguments)
    shape = batch.tokens.shape
    return logp_T.reshape(shape), entropy_T.reshape(shape), summary


def _shard_map(function: Callable, hp: Hyperparameters, out_specs: Any) -> Callable:
    """(params, batch, hp) → …, for each device's rows and part of the parameters."""
    specs = model.params.partition_specs(hp.static.model)
    in_specs = (specs, sharding.spec("rows"), PartitionSpec())
    return sharding.shard_map(function, hp.static.mesh, in_specs, out_specs)


def _micro_batches(batch: Batch, hp: Hyperparameters) -> tuple[Any, Callable[[Any], Batch]]:
    """How many micro-batches are in use on each device, and a function that gives one of them."""
    m, count, rows = hp.static.micro_batches, batch.count, batch.replace(count=None)
    split = jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), rows)
    return m if count is None else count[0], lambda i: jax.tree.map(lambda x: x[i], split)


def _sum(function: Callable[[Batch], Any], micros: tuple[Any, Callable[[Any], Batch]]) -> Any:
    """The sum over micro-batches of arrays and mergeable reductions."""
    count, at = micros
    if isinstance(count, int) and count == 1:
        return function(at(0))
    start = zero(jax.eval_shape(lambda: function(at(0))))
    return jax.lax.fori_loop(0, count, lambda i, total: add(function(at(i)), total), start)


def map_rows(function: Callable, params: Any, batch: Batch, hp: Hyperparameters) -> Any:
    """``function(params, micro-batch, hp)`` of the rows of each device; results are [B, ...].

    Those of micro-batches that are not in use are 0.
    """

    def local(params, batch, hp):
        count, at = _micro_batches(batch, hp)
        shapes = jax.eval_shape(lambda: function(params, at(0), hp))
        start = jax.tree.map(
            lambda x: jnp.zeros((hp.static.micro_batches, *x.shape), x.dtype), shapes
        )

        def visit(i, out):
            found = function(params, at(i), hp)
            return jax.tree.map(lambda x, y: x.at[i].set(y), out, found)

        out = jax.lax.fori_loop(0, count, visit, start)
        return jax.tree.map(lambda x: x.reshape(batch.tokens.shape[0], *x.shape[2:]), out)

    return _shard_map(local, hp, sharding.spec("rows"))(params, batch, hp)


@jax.jit
def score(params: Any, batch: Batch, hp: Hyperparameters) -> jax.Array:
    """log π of the tokens, f32[B, S], by the programs and micro-batches of `update`."""
    return map_rows(lambda *arguments: forward(*arguments)[0], params, batch, hp)


@jax.jit
def score_routing(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[jax.Array, jax.Array | None]:
    """`score` and the routing that an update replays with R2, by the routers' own choice."""

    def one(params, micro, hp):
        logp_BS, _, summary = forward(params, micro, hp)
        return logp_BS, summary and routing.recorded(summary, micro.segments)

    return map_rows(one, params, batch, hp.replace(routing_replay="none"))


def _per_token(batch: Batch, hp: Hyperparameters) -> dict[str, jax.Array]:
    """What the loss of each token needs besides its log π, [T]."""
    mask_BS = batch.mask
    divisor_BS = objectives.divisors(hp.objective, mask_BS, batch.segments, jnp.float32)
    arrays = {
        "old_logp": batch.old_logp,
        "advantages": batch.token_advantages,
        "mask": mask_BS,
        "ref_logp": batch.ref_logp,
        "weights": batch.weights,
        "divisor": jnp.where(mask_BS, divisor_BS, 1),
    }
    return {name: x.reshape(-1) for name, x in arrays.items() if x is not None}


def _token_losses(kl: str, logp_T: jax.Array, per_token: tuple[dict, Any]) -> jax.Array:
    own, objective = per_token
    losses_T = objectives.token_losses(
        objective, logp_T, own["old_logp"], own["advantages"], own["mask"],
        ref_logp_T=own.get("ref_logp"), kl=kl, weights_T=own.get("weights"),
    )  # fmt: skip
    return losses_T / own["divisor"]


def _loss_terms(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[dict[str, Any], routing.Summary | None]:
    arguments, summary = _head(params, batch, hp)
    by_token = objectives.by_token(hp.objective)
    if by_token:
        loss = partial(_token_losses, hp.static.kl)
        per_token = _per_token(batch, hp), hp.objective
        numerator, *found = head.token_loss(loss, per_token, *arguments)
        found = jax.lax.stop_gradient(found)
    else:
        found = head.logp_entropy(*arguments)
    logp_BS, entropy_BS = (x.reshape(batch.tokens.shape) for x in found)
    terms = objectives.policy_terms(
        hp.objective, logp_BS, batch.old_logp, batch.advantages, batch.mask,
        ref_logp_BT=batch.ref_logp, kl=hp.static.kl,
        weights_BT=batch.weights, segments_BT=batch.segments,
    )  # fmt: skip
    if by_token:  # the same sum, whose gradient is known already
        terms["loss"] = terms["loss"].replace(numerator=numerator)
    logp_BS, entropy_BS = jax.lax.stop_gradient((logp_BS, entropy_BS))
    terms["policy/entropy"] = masked.mean(entropy_BS, batch.mask)
    terms["nonfinite"] = diagnostics.nonfinite(logp_BS, batch)
    if summary is not None:
        terms |= routing.terms(summary, _counts(batch), batch.routing)
    return terms | diagnostics.token_terms(hp.objective, logp_BS, batch), summary


def _balance(params: Any, micros: tuple, hp: Hyperparameters):
    """The load-balancing loss of a micro-batch as a function of its summary, or None.

    Its fractions are those of the whole minibatch, hence one more forward pass; its sum is scaled
    so that dividing by the policy loss's denominator makes it a mean over tokens.
    """
    if hp.router_aux_coef is None or not hp.static.model.num_experts:
        return None

    def forward_only(micro):
        terms, _ = _loss_terms(params, micro, hp)
        return {key: terms[key] for key in ("loss", "router/load", "router/entropy")}

    totals = collectives.merge(jax.lax.stop_gradient(_sum(forward_only, micros)))
    share_LE = masked.ratio(totals["router/load"])
    layers = share_LE.shape[0]
    tokens = totals["router/entropy"].denominator / layers
    scale = masked.ratio(Weighted(totals["loss"].denominator.astype(jnp.float32), tokens))
    return lambda summary: hp.router_aux_coef * scale * routing.balance(summary, share_LE, layers)


def gradient(params: Any, batch: Batch, hp: Hyperparameters) -> tuple[Any, dict[str, Any]]:
    """Gradient of the loss and the merged terms of a minibatch, accumulated over micro-batches.

    Numerators and denominators add up, over micro-batches and devices, and are divided once: the
    split changes nothing.
    """
    numerators, terms = _numerators(params, batch, hp)
    return _divided(numerators, terms), terms


def _divided(numerators: Any, terms: dict[str, Any]) -> Any:
    count = terms["loss"].denominator
    return jax.tree.map(lambda g: masked.ratio(Weighted(g, count.astype(g.dtype))), numerators)


def _numerators(params: Any, batch: Batch, hp: Hyperparameters) -> tuple[Any, dict[str, Any]]:
    out_specs = (model.params.partition_specs(hp.static.model), PartitionSpec())
    return _shard_map(_gradient, hp, out_specs)(params, batch, hp)


def _gradient(params: Any, batch: Batch, hp: Hyperparameters) -> tuple[Any, dict[str, Any]]:
    micros = _micro_batches(batch, hp)
    balance = _balance(params, micros, hp)

    def numerator(params, micro):
        terms, summary = _loss_terms(params, micro, hp)
        if balance is not None:
            extra = balance(summary)
            loss = terms["loss"]
            terms["loss"] = loss.replace(numerator=loss.numerator + extra)
            terms["router/balance"] = loss.replace(numerator=extra)
        return terms["loss"].numerator, terms

    grads, terms = _sum(lambda micro: jax.grad(numerator, has_aux=True)(params, micro), micros)
    grads = model.params.psum_gradients(grads, hp.static.model)
    terms = routing.finish_load(collectives.merge(terms))
    return grads, terms


@partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, batch: Batch, hp: Hyperparameters
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on one minibatch; none where no token counts, or a number is not finite.

    Args:
      state: donated; use the one that comes back.
      batch: rows whose number ``micro_batches`` divides.
      hp: hyperparameters.

    Returns:
      (state, metrics): metrics as mergeable reductions, see `masked`.
    """
    chex.assert_equal_shape([batch.tokens, batch.mask, batch.segments, batch.old_logp])
    parts = hp.static.micro_batches * sharding.parts(hp.static.mesh)
    chex.assert_is_divisible(batch.tokens.shape[0], parts)
    numerators, terms = _numerators(state.params, batch, hp)
    grads = _divided(numerators, terms)
    rate, norm = learning_rate(hp, state.update), optax.tree.norm(grads)
    late = ~jnp.isfinite(jnp.stack([masked.ratio(terms["loss"]), norm]))
    bad = jnp.concatenate([terms["nonfinite"].value, late.astype(jnp.float32)])

    def move(state):
        step = optimizer(hp, rate)
        grads = _divided(numerators, terms)  # again: in one fusion with what follows
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

    Where no token was counted, means are NaN: 0 would read as a measurement.
    """

    def values(terms):
        empty = terms["loss"].denominator == 0

        def value(x):
            if isinstance(x, Weighted):
                return jnp.where(empty & (x.denominator == 0), jnp.nan, masked.ratio(x))
            return masked.value(x)

        found = jax.tree.map(value, terms, is_leaf=is_reduction)
        return {"policy/loss": found.pop("loss"), **found}

    each = [values(m) for m in metrics]
    # Later minibatches compare the sampler with a policy that has moved on.
    gap = {k: v for k, v in each[0].items() if k.startswith("sampler/")}
    return values(merge(jax.tree.map(lambda *x: jnp.stack(x), *metrics))) | gap, each


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return {"edges": value.edges.tolist(), "counts": value.counts.tolist()}
    return float(value)


def record(update: int, merged: dict, each: list[dict]) -> dict[str, Any]:
    """An iteration on the host, as plain numbers and lists; the other arguments are what
    `finish_iteration` gives.

    Each minibatch says whether its update was skipped, and what was the first that was not finite.
    """
    keys = [k for k in each[0] if k.startswith(("policy/", "grad/"))]
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
    state: TrainState, minibatches: tuple[Batch, ...], hp: Hyperparameters
) -> tuple[TrainState, dict[str, Any]]:
    """An iteration's updates, one for each minibatch.

    Returns:
      (state, record): plain numbers of the iteration, histograms as edges and counts, and under
      "minibatch" the numbers of each update.
    """
    collected = []
    for batch in minibatches:
        state, metrics = update(state, batch, hp)
        collected.append(metrics)
    found = sharding.to_host((state.update, *finish_iteration(tuple(collected))))
    return end_iteration(state), record(*found)
