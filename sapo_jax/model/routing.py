"""Routers in training: statistics, replay of recorded routing, and the load-balancing loss.

A row's routing is i8/i16[B, S, L_moe, k]: entry s holds the experts that token s takes in each
sparse layer as an input, −1 where none was recorded (pads, and the last token of a completion,
which is never fed).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax import masked
from sapo_jax.model import moe
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.moe import Routing
from sapo_jax.types import Max, Weighted

REPLAY = ("none", "R2", "R3")  # nothing; the old policy's routing; the sampler's


@struct.dataclass
class Summary:
    """A sparse layer's routing, summed over the tokens of a batch; stacked over layers."""

    own: jax.Array  # i8/i16[B, S, k], the router's own choice
    counts: jax.Array  # f32[E], tokens that took each expert
    probs: jax.Array  # f32[E], sum of the probabilities; differentiable
    entropy: jax.Array  # f32[]


def summarise(routing: Routing, count_BS: jax.Array, config: ModelConfig) -> Summary:
    """Sums over the tokens that exist, each as often as ``count_BS`` says (see `segments`)."""
    probs_BSE = masked.keep(routing.probs, count_BS[..., None] > 0)
    entropy_BS = -jnp.sum(probs_BSE * jnp.log(jnp.where(probs_BSE > 0, probs_BSE, 1)), -1)
    each_BSk = jnp.broadcast_to(count_BS[..., None], routing.experts.shape)
    counts_E = jnp.zeros(config.num_experts).at[routing.experts.ravel()].add(each_BSk.ravel())
    return Summary(
        own=routing.own.astype(moe.id_dtype(config)),
        counts=counts_E,
        probs=jnp.sum(probs_BSE * count_BS[..., None], (0, 1)),
        entropy=jnp.sum(entropy_BS * count_BS),
    )


def recorded(summary: Summary, segments_BS: jax.Array) -> jax.Array:
    """The routers' own choices as a row's routing, −1 at pads."""
    own_BSLk = jnp.moveaxis(summary.own, 0, 2)
    return jnp.where(segments_BS[..., None, None] > 0, own_BSLk, -1).astype(own_BSLk.dtype)


def terms(summary: Summary, count_BS: jax.Array, routing_BSLk: jax.Array | None) -> dict[str, Any]:
    """Mergeable statistics; `finish_load` makes numbers of the load once it is merged.

    ``router/differs`` is the share of (layer, token) whose own choice of experts is not the
    recorded one, whether that is replayed or not.
    """
    tokens = jnp.sum(count_BS)
    layers, _, _, k = summary.own.shape
    summary = jax.lax.stop_gradient(summary)
    out = {
        "router/entropy": Weighted(jnp.sum(summary.entropy), layers * tokens),
        "router/load": Weighted(summary.counts, jnp.broadcast_to(k * tokens, summary.counts.shape)),
    }
    if routing_BSLk is not None:
        own_BSLk = jnp.moveaxis(summary.own, 0, 2)
        known_BSL = (routing_BSLk[..., 0] >= 0) * count_BS[..., None]
        differs_BSL = moe.differs(own_BSLk, routing_BSLk.astype(own_BSLk.dtype))
        out["router/differs"] = Weighted(jnp.sum(differs_BSL * known_BSL), jnp.sum(known_BSL))
    return out


def finish_load(merged: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a minibatch's load: 1 is balanced, E/k a layer whose tokens all agree."""
    if "router/load" not in merged:
        return merged
    rest = dict(merged)
    share_LE = masked.ratio(rest.pop("router/load"))
    rest["router/load_max"] = Max(share_LE.shape[-1] * jnp.max(share_LE))
    rest["router/unused"] = masked.mean(jnp.float32(share_LE == 0), jnp.full(share_LE.shape, True))
    return rest


def balance(summary: Summary, share_LE: jax.Array, layers: int) -> jax.Array:
    """Σ over tokens of the load-balancing loss E·k·Σ_e f_e·P_e (arXiv 2101.03961, eq. 4).

    Args:
      summary: of a micro-batch, whose probabilities carry the gradient.
      share_LE: f_e/k over the whole minibatch, a constant: so that the sum over micro-batches,
        divided by the minibatch's tokens, does not depend on the split.
      layers: the loss is a mean over this many layers.
    """
    *_, k = summary.own.shape
    e = share_LE.shape[-1]
    return e * k * jnp.sum(summary.probs * jax.lax.stop_gradient(share_LE)) / layers
