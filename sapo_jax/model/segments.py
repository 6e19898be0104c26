"""Packed rows: which token follows which, from the ids of segments and of their prefixes.

A row holds several segments, numbered from 1; 0 is padding. A segment may continue another one of
its row, its prefix: a prompt stands once before the completions that share it. Each of those sees
the prompt and itself, and is numbered on from the prompt's end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _starts(segments_BS: jax.Array) -> jax.Array:
    """Whether a token is the first of its segment, bool[B, S]."""
    return segments_BS != jnp.roll(segments_BS, 1, -1).at[:, 0].set(-1)


def _of_prefix(reduce, values_BS, ids_BS, prefix_BS):
    """Reduced values by id, looked up at each token's prefix, [B, S]."""
    bins = ids_BS.shape[-1] + 1
    by_id = jax.vmap(lambda v, s: reduce(v, s, bins))(values_BS, ids_BS)
    return jnp.take_along_axis(by_id, prefix_BS, -1)


def positions(
    segments_BS: jax.Array, prefix_BS: jax.Array | None = None, steps_BS: jax.Array | None = None
) -> jax.Array:
    """Index of each token in its sequence, prefix included, i32[B, S].

    With ``steps_BS`` it is the sum of the steps ≥ 0 of the tokens before; without, each is 1.
    """
    if steps_BS is None:
        before_BS = jnp.arange(segments_BS.shape[-1], dtype=jnp.int32)
        steps_BS = 1
    else:
        before_BS = jnp.cumsum(steps_BS, -1) - steps_BS
    start_BS = jnp.where(_starts(segments_BS), before_BS, 0)
    own_BS = before_BS - jax.lax.cummax(start_BS, axis=1)
    if prefix_BS is None:
        return own_BS
    steps_BS = jnp.where(segments_BS > 0, steps_BS, 0)  # pads are what a segment without has
    return own_BS + _of_prefix(jax.ops.segment_sum, steps_BS, segments_BS, prefix_BS)


def predecessors(segments_BS: jax.Array, prefix_BS: jax.Array | None = None) -> jax.Array:
    """Index in the row of the token before each, i32[B, S]; the first of a sequence has itself."""
    index_BS = jnp.broadcast_to(
        jnp.arange(segments_BS.shape[-1], dtype=jnp.int32), segments_BS.shape
    )
    before_BS = index_BS
    if prefix_BS is not None:
        end_BS = _of_prefix(jax.ops.segment_max, index_BS, segments_BS, prefix_BS)
        before_BS = jnp.where(prefix_BS > 0, end_BS, index_BS)
    return jnp.where(_starts(segments_BS), before_BS, index_BS - 1)


def multiplicity(segments_BS: jax.Array, prefix_BS: jax.Array | None = None) -> jax.Array:
    """Sequences that each token stands for, f32[B, S]: 0 at pads, G in a prompt that G share."""
    present_BS = (segments_BS > 0).astype(jnp.float32)
    if prefix_BS is None:
        return present_BS
    first_BS = (_starts(segments_BS) & (prefix_BS > 0)).astype(jnp.float32)
    sharing_BS = _of_prefix(jax.ops.segment_sum, first_BS, prefix_BS, segments_BS)
    return present_BS * jnp.maximum(sharing_BS, 1)
