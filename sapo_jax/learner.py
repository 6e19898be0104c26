"""The learner: one jitted update of the policy, and the scoring that shares its log π.

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
from flax import struct

from sapo_jax import diagnostics, masked, objectives, routing
from sapo_jax.aggregations import finish
from sapo_jax.model import head, params, transformer
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective
from sapo_jax.types import Batch, Histogram, TrainState, Weighted, merge

SCHEDULES = ("constant", "linear", "cosine")


@struct.dataclass
class Hyperparameters:
    """Everything an update is told besides its state and batch.

    Attributes:
      objective: from `objectives.resolve`.
      learning_rate: the schedule's peak.
      weight_decay: decoupled, on matrices only.
      max_grad_norm: gradients are clipped to this global norm; inf switches it off.
      temperature: of the policy, as in the sampler.
      model: the model's shape.
      micro_batches: forward-backward passes an update; they change memory, not the result.
      head_chunk: rows whose logits exist at a time.
      remat: recompute each layer in the backward pass.
      kl: estimator of the KL penalty, see `objectives.kl_estimate`.
      schedule: one of SCHEDULES; ``warmup`` and ``total`` are in updates.
      b1, b2, eps: Adam's.
      routing_replay: one of `routing.REPLAY`; other than "none", the experts are those of
        ``batch.routing``, with the gates of the present router.
      router_aux_coef: weight of the load-balancing loss; None switches it off.
    """

    objective: Objective
    learning_rate: jax.Array | float
    weight_decay: jax.Array | float
    max_grad_norm: jax.Array | float
    temperature: jax.Array | float
    model: ModelConfig = struct.field(pytree_node=False)
    micro_batches: int = struct.field(pytree_node=False, default=1)
    head_chunk: int = struct.field(pytree_node=False, default=1024)
    remat: bool = struct.field(pytree_node=False, default=False)
    kl: str = struct.field(pytree_node=False, default="k3")
    schedule: str = struct.field(pytree_node=False, default="constant")
    warmup: int = struct.field(pytree_node=False, default=0)
    total: int = struct.field(pytree_node=False, default=0)
    b1: float = struct.field(pytree_node=False, default=0.9)
    b2: float = struct.field(pytree_node=False, default=0.95)
    eps: float = struct.field(pytree_node=False, default=1e-8)
    routing_replay: str = struct.field(pytree_node=False, default="none")
    router_aux_coef: jax.Array | float | None = None


def learning_rate(hp: Hyperparameters, update: jax.Array) -> jax.Array:
    """The learning rate of an update (from 0): linear warm-up to the peak, then the schedule."""
    rest = max(1, hp.total - hp.warmup)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
    }[hp.schedule]
    warm = optax.linear_schedule(1 / max(1, hp.warmup), 1.0, max(1, hp.warmup - 1))
    factor = optax.join_schedules([warm, after], [hp.warmup])(update)
    return jnp.float32(hp.learning_rate) * factor


def _matrices(tree: Any, config: ModelConfig) -> Any:
    """Which parameters decay: those of the table that are not norms."""
    del tree
    return jax.tree.map(
        lambda spec: spec.fan_in > 0,
        params.table(config),
        is_leaf=lambda x: isinstance(x, params.Spec),
    )


def optimizer(hp: Hyperparameters, rate: jax.Array) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind clipping by global norm; its state depends on no setting."""
    return optax.chain(
        optax.clip_by_global_norm(hp.max_grad_norm),
        optax.scale_by_adam(hp.b1, hp.b2, hp.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(hp.weight_decay, partial(_matrices, config=hp.model)),
        optax.scale(-rate),
    )


@jax.jit
def init(weights: Any, hp: Hyperparameters) -> TrainState:
    """The state before the first iteration."""
    zero = jnp.int32(0)
    opt_state = optimizer(hp, learning_rate(hp, zero)).init(weights)
    return TrainState(zero, zero, weights, opt_state)


def forward(
    weights: Any, batch: Batch, hp: Hyperparameters
) -> tuple[jax.Array, jax.Array, routing.Summary | None]:
    """log π and entropy of the tokens under the mask, and what the routers did.

    Returns:
      (f32[B, S], f32[B, S], summary): 0 outside the mask; no summary of a dense model.
    """
    replay = None
    if hp.routing_replay != "none" and hp.model.num_experts:
        if batch.routing is None:
            raise ValueError(f"routing_replay={hp.routing_replay!r}: the batch has no routing")
        replay = batch.routing
    hidden_BSD, summary = transformer.hidden_routing(
        weights, hp.model, batch.tokens, batch.segments, remat=hp.remat, replay_BSLk=replay,
        summarise=lambda r: routing.summarise(r, batch.segments > 0, hp.model),
    )  # fmt: skip
    logp_T, entropy_T = head.logp_entropy(
        hidden_BSD[:, :-1].reshape(-1, hp.model.hidden_size),
        params.head_weight(weights),
        batch.tokens[:, 1:].reshape(-1),
        batch.mask[:, 1:].reshape(-1),
        jnp.float32(hp.temperature),
        hp.head_chunk,
    )
    rows, width = batch.tokens.shape

    def align(x_T):
        return jnp.pad(x_T.reshape(rows, width - 1), ((0, 0), (1, 0)))

    return align(logp_T), align(entropy_T), summary


def _micro(tree: Any, count: int) -> Any:
    """Split the rows into micro-batches, [M, B/M, ...]."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


@jax.jit
def score(weights: Any, batch: Batch, hp: Hyperparameters) -> jax.Array:
    """log π of the tokens, f32[B, S], by the programs and micro-batches of `update`."""
    logp = jax.lax.map(lambda b: forward(weights, b, hp)[0], _micro(batch, hp.micro_batches))
    return logp.reshape(batch.tokens.shape)


@jax.jit
def score_routing(
    weights: Any, batch: Batch, hp: Hyperparameters
) -> tuple[jax.Array, jax.Array | None]:
    """`score` and the routing that an update replays with R2, by the routers' own choice."""
    hp = hp.replace(routing_replay="none")

    def one(micro):
        logp_BS, _, summary = forward(weights, micro, hp)
        return logp_BS, summary and routing.recorded(summary, micro.segments)

    out = jax.lax.map(one, _micro(batch, hp.micro_batches))
    return jax.tree.map(lambda x: x.reshape(batch.tokens.shape[0], *x.shape[2:]), out)


def _loss_terms(
    weights: Any, batch: Batch, hp: Hyperparameters
) -> tuple[dict[str, Any], routing.Summary | None]:
    logp_BS, entropy_BS, summary = forward(weights, batch, hp)
    terms = objectives.policy_terms(
        hp.objective,
        logp_BS,
        batch.old_logp,
        batch.advantages,
        batch.mask,
        ref_logp_BT=batch.ref_logp,
        kl=hp.kl,
        weights_BT=batch.weights,
        segments_BT=batch.segments,
    )
    logp_BS, entropy_BS = jax.lax.stop_gradient((logp_BS, entropy_BS))
    terms["policy/entropy"] = masked.mean(entropy_BS, batch.mask)
    if summary is not None:
        terms |= routing.terms(summary, batch.segments, batch.routing)
    return terms | diagnostics.token_terms(hp.objective, logp_BS, batch), summary


def _balance(weights: Any, micros: Batch, hp: Hyperparameters):
    """The load-balancing loss of a micro-batch as a function of its summary, or None.

    Its fractions are those of the whole minibatch, hence one more forward pass; its sum is scaled
    so that dividing by the policy loss's denominator makes it a mean over tokens.
    """
    if hp.router_aux_coef is None or not hp.model.num_experts:
        return None

    def forward_only(micro):
        terms, _ = _loss_terms(weights, micro, hp)
        return {key: terms[key] for key in ("loss", "router/load", "router/entropy")}

    totals = merge(jax.lax.stop_gradient(jax.lax.map(forward_only, micros)))
    share_LE = masked.ratio(totals["router/load"])
    layers = share_LE.shape[0]
    tokens = totals["router/entropy"].denominator / layers
    scale = masked.ratio(Weighted(totals["loss"].denominator.astype(jnp.float32), tokens))
    return lambda summary: hp.router_aux_coef * scale * routing.balance(summary, share_LE, layers)


def gradient(weights: Any, batch: Batch, hp: Hyperparameters) -> tuple[Any, dict[str, Any]]:
    """Gradient of the loss and the merged terms of a minibatch, accumulated over micro-batches.

    Numerators and denominators add up and are divided once, so the split changes nothing.
    """
    micros = _micro(batch, hp.micro_batches)
    balance = _balance(weights, micros, hp)

    def numerator(w, micro):
        terms, summary = _loss_terms(w, micro, hp)
        if balance is not None:
            extra = balance(summary)
            loss = terms["loss"]
            terms["loss"] = loss.replace(numerator=loss.numerator + extra)
            terms["router/balance"] = loss.replace(numerator=extra)
        return terms["loss"].numerator, terms

    def accumulate(total, micro):
        grads, terms = jax.grad(numerator, has_aux=True)(weights, micro)
        return jax.tree.map(jnp.add, total, grads), terms

    zeros = jax.tree.map(jnp.zeros_like, weights)
    grads, stacked = jax.lax.scan(accumulate, zeros, micros)
    terms = routing.finish_load(merge(stacked))
    count = terms["loss"].denominator
    grads = jax.tree.map(lambda g: masked.ratio(Weighted(g, count.astype(g.dtype))), grads)
    return grads, terms


@partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, batch: Batch, hp: Hyperparameters
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on one minibatch.

    Args:
      state: donated; use the one that comes back.
      batch: rows whose number ``hp.micro_batches`` divides.
      hp: hyperparameters.

    Returns:
      (state, metrics): metrics as mergeable reductions, see `objectives.finish`.
    """
    chex.assert_equal_shape([batch.tokens, batch.mask, batch.segments, batch.old_logp])
    chex.assert_is_divisible(batch.tokens.shape[0], hp.micro_batches)
    grads, terms = gradient(state.params, batch, hp)
    rate = learning_rate(hp, state.update)
    step = optimizer(hp, rate)
    updates, opt_state = step.update(grads, state.opt_state, state.params)
    weights = optax.apply_updates(state.params, updates)
    one = jnp.float32(1)
    metrics = {
        **terms,
        "grad/norm": Weighted(optax.tree.norm(grads), one),
        "grad/update_norm": Weighted(optax.tree.norm(updates), one),
        "learning_rate": Weighted(rate, one),
    }
    return state.replace(update=state.update + 1, params=weights, opt_state=opt_state), metrics


@jax.jit
def finish_iteration(metrics: tuple) -> tuple[dict, list[dict]]:
    """Metrics of an iteration, merged over its minibatches, and those of each minibatch."""
    loss, merged = finish(merge(jax.tree.map(lambda *x: jnp.stack(x), *metrics)))
    each = [finish(m) for m in metrics]
    # Later minibatches compare the sampler with a policy that has moved on.
    gap = {k: v for k, v in each[0][1].items() if k.startswith("sampler/")}
    return {"policy/loss": loss, **merged, **gap}, [{"policy/loss": x, **m} for x, m in each]


def record(merged: dict, each: list[dict]) -> dict[str, Any]:
    """What `finish_iteration` gives, on the host, as plain numbers and lists."""
    keys = [k for k in each[0] if k.startswith(("policy/", "grad/"))]
    minibatches = [{k: float(m[k]) for k in keys} for m in each]
    return {k: _plain(v) for k, v in merged.items()} | {"minibatch": minibatches}


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
    found = jax.device_get(finish_iteration(tuple(collected)))
    return end_iteration(state), record(*found)


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return {"edges": value.edges.tolist(), "counts": value.counts.tolist()}
    return float(value)
