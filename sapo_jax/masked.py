"""The only place where a mask divides: masked sums, means, and per-sequence reductions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.types import Effective, Max, Min, Weighted, is_reduction


def ratio(weighted: Weighted) -> jax.Array:
    """Numerator over denominator, and 0 where the denominator is 0 (nothing was counted)."""
    empty = weighted.denominator == 0
    return jnp.where(empty, 0, weighted.numerator) / jnp.where(empty, 1, weighted.denominator)


def value(reduction: Any) -> Any:
    """The number of a merged reduction; a histogram stays what it is."""
    if isinstance(reduction, Weighted):
        return ratio(reduction)
    if isinstance(reduction, Effective):
        square = reduction.count * reduction.square
        return ratio(Weighted(reduction.total**2, square))
    return reduction.value if isinstance(reduction, Max | Min) else reduction


def finish(terms: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """Divide once: (loss to minimise, metrics) from merged terms."""
    values = jax.tree.map(value, terms, is_leaf=is_reduction)
    return values.pop("loss"), values


def keep(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values under the mask, 0 elsewhere; what is masked out (NaN, too) gets gradient 0."""
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def mean(values: jax.Array, mask: jax.Array) -> Weighted:
    """The masked mean of all values, not divided yet."""
    return Weighted(jnp.sum(keep(values, mask)), jnp.sum(mask, dtype=values.dtype))


def _by_segment(values_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Sums by segment id, f[B, T + 1, ...]; ids run from 1 to T, 0 is padding."""
    bins = segments_BT.shape[-1] + 1
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, bins))(values_BT, segments_BT)


def total_by_sequence(
    values_BTK: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """Of each sequence, sums over its masked tokens: f[B, K], or f[B, T + 1, K] by segment id."""
    values_BTK = keep(values_BTK, mask_BT[..., None])
    return jnp.sum(values_BTK, 1) if segments_BT is None else _by_segment(values_BTK, segments_BT)


def at_tokens(values: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """A number of each sequence, f[B] or f[B, T + 1] by segment id, at its tokens."""
    if segments_BT is None:
        return values[:, None]
    return jnp.take_along_axis(values, segments_BT, -1)


def sequence_sum(
    values_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """At each token, the sum over the masked tokens of its sequence, f[B, T].

    A sequence is a row, or, where rows are packed, a segment of a row.
    """
    values_BT = keep(values_BT, mask_BT)
    if segments_BT is None:
        return jnp.broadcast_to(jnp.sum(values_BT, -1, keepdims=True), values_BT.shape)
    return at_tokens(_by_segment(values_BT, segments_BT), segments_BT)


def sequence_cumsum(
    values_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """At each token, the sum over the masked tokens of its sequence up to it, f[B, T]."""
    values_BT = keep(values_BT, mask_BT)
    sums_BT = jnp.cumsum(values_BT, -1)
    if segments_BT is None:
        return sums_BT
    first_BT = segments_BT != jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before_BT = keep(sums_BT - values_BT, first_BT)  # the tokens of a segment are adjacent
    return sums_BT - at_tokens(_by_segment(before_BT, segments_BT), segments_BT)


def sequence_mean(
    values_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """At each token, the mean over the masked tokens of its sequence, f[B, T]."""
    ones_BT = jnp.ones_like(values_BT)
    total_BT = sequence_sum(values_BT, mask_BT, segments_BT)
    return ratio(Weighted(total_BT, sequence_sum(ones_BT, mask_BT, segments_BT)))


def sequence_count(mask_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """The number of sequences that have a masked token, i32[]."""
    if segments_BT is None:
        return jnp.sum(jnp.any(mask_BT, -1), dtype=jnp.int32)
    return jnp.sum(_by_segment(mask_BT.astype(jnp.int32), segments_BT) > 0, dtype=jnp.int32)
