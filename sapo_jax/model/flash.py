"""Flash attention for GPU: causal, over packed rows and shared prefixes (Pallas by way of Triton).

As `blocked`, but with a pair of blocks in a core's registers: no scores reach memory, and blocks
that the mask hides are not visited. The backward pass is two kernels, one for the queries and one
for keys and values, so that no sum depends on the order of threads: results are the same each time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sapo_jax.model.splash import SAVED

HIGHEST = jax.lax.Precision.HIGHEST
HIDDEN = -1e30  # finite: a query without any key must not give NaN
LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Sizes of a kernel: the tokens of its blocks, and what a core makes of them."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """The tiles of the forward pass and of the two kernels of the backward pass."""

    forward: Tiles
    d_queries: Tiles
    d_keys: Tiles


# The best of those in experiments/gpu/results, on an H200; d_keys matters most.
HALF = Kernels(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))
SINGLE = Kernels(*[Tiles(32, 32, 4, 2)] * 3)  # of f32: larger ones take minutes to compile


def supports(head_dim: int) -> bool:
    """Whether the kernels have tiles for heads of this size."""
    return head_dim in (16, 32, 64, 128)


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """Two matrices' product over an axis of each, in f32; f32 without TF32."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=HIGHEST, preferred_element_type=jnp.float32)


def _visible(segments, prefix, keys, first_query, first_key):
    """Which of the keys the queries see, bool[q, k]: their segment's or prefix's, up to them."""
    query = first_query + jax.lax.broadcasted_iota(jnp.int32, (segments.size, keys.size), 0)
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, (segments.size, keys.size), 1)
    same = (segments[:, None] == keys[None, :]) | (prefix[:, None] == keys[None, :])
    return (query >= key) & same & (keys[None, :] > 0)


def _ranges(segments, prefix, queries: int, keys: int):
    """The blocks to visit, by the least and greatest id in each.

    Returns:
      (i32[B, S/queries, 6], i32[B, S/keys, 4]): where ranges of blocks begin and the last one ends.
      For a block of queries: keys of its prefixes (two numbers); of its own segments, masked, then
      those that all of its queries see whole, then masked. For a block of keys likewise.
    """

    def bounds(ids, size):
        ids = ids.reshape(ids.shape[0], -1, size)
        return jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max), -1), jnp.max(ids, -1)

    def uniform(ids, size):  # the one id of a block, −1 where there are others or pads
        ids = ids.reshape(ids.shape[0], -1, size)
        first, last = jnp.min(ids, -1), jnp.max(ids, -1)
        return jnp.where((first == last) & (first > 0), first, -1)

    low, high = bounds(segments, keys)
    last_query = jnp.arange(1, segments.shape[1] // queries + 1)[:, None] * queries
    first_key = jnp.arange(low.shape[1]) * keys
    before = last_query - queries >= first_key + keys - 1

    def meets(ids):
        first, last = bounds(ids, queries)
        overlap = (low[:, None] <= last[..., None]) & (high[:, None] >= first[..., None])
        return overlap & (last_query > first_key)

    def extent(wanted, axis):
        size, some = wanted.shape[axis], jnp.any(wanted, axis)
        stop = size - jnp.argmax(jnp.flip(wanted, axis), axis)
        return jnp.where(some, jnp.argmax(wanted, axis), 0), jnp.where(some, stop, 0)

    def around(wanted, whole, axis):  # begin, begin and end of what is seen whole, end
        (start, stop), (first, last) = extent(wanted, axis), extent(whole, axis)
        none = jnp.sum(whole, axis) != last - first  # others between them
        none |= first == last
        return start, jnp.where(none, stop, first), jnp.where(none, stop, last), stop

    own, of_prefix, one = meets(segments), meets(prefix), uniform(segments, keys)[:, None]
    own_whole = (uniform(segments, queries)[..., None] == one) & (one > 0) & before
    prefix_whole = (uniform(prefix, queries)[..., None] == one) & (one > 0) & before
    parts = around(own, own_whole, 2)
    first, last = extent(of_prefix, 2)
    last = jnp.where(parts[3] > 0, jnp.minimum(last, parts[0]), last)  # none is visited twice
    shared = jnp.any(prefix_whole, 1, keepdims=True)  # most of its queries are elsewhere
    by_keys = around(own | of_prefix, jnp.where(shared, prefix_whole, own_whole), 1)
    return tuple(jnp.stack(x, -1).astype(jnp.int32) for x in ((first, last, *parts), by_keys))


def _over(bounds, body, carry):
    """``body(masked, block, carry)`` over three ranges of blocks, of which the middle is not."""
    for masked, first, last in zip((True, False, True), bounds, bounds[1:], strict=False):
        carry = jax.lax.fori_loop(first, last, partial(body, masked), carry)
    return carry


def _over_keys(ranges, body, carry):
    """The same for a block of queries: first those of prefixes."""
    carry = jax.lax.fori_loop(ranges[0], ranges[1], partial(body, True), carry)
    return _over([ranges[n] for n in range(2, 6)], body, carry)


def _scores(q, k, scale, visible):
    """Scaled by log₂e too, so that powers of 2 serve; 0 weight where hidden, False: nowhere."""
    scores = dot(q, k, contract=(1, 1)) * (scale * LOG2_E)
    return scores if visible is False else jnp.where(visible, scores, HIDDEN)


def _forward_kernel(q, k, v, seg_q, pre_q, seg, ranges, out, lse, *, tiles: Tiles, scale):
    queries, segments, prefix = q[...], seg_q[...], pre_q[...]
    first = pl.program_id(0) * tiles.queries

    def visit(masked, j, carry):
        high, total, mixed = carry
        at = pl.ds(j * tiles.keys, tiles.keys)
        visible = masked and _visible(segments, prefix, seg[at], first, j * tiles.keys)
        scores = _scores(queries, k[at, :], scale, visible)
        higher = jnp.maximum(high, jnp.max(scores, -1))
        weights = jnp.exp2(scores - higher[:, None])
        decay = jnp.exp2(high - higher)
        values = v[at, :]
        own = dot(weights.astype(values.dtype), values, contract=(1, 0))
        return higher, total * decay + jnp.sum(weights, -1), mixed * decay[:, None] + own

    # Above what hides a key: a query without any has weights of 0.
    start = jnp.full(tiles.queries, HIDDEN / 10), jnp.zeros(tiles.queries), jnp.zeros(q.shape)
    high, total, mixed = _over_keys(ranges, visit, start)
    safe = jnp.where(total > 0, total, 1.0)
    out[...] = (mixed / safe[:, None]).astype(out.dtype)
    lse[...] = high + jnp.log2(safe)


def _d_queries_kernel(
    q, k, v, seg_q, pre_q, seg, ranges, d_out, lse, delta, d_q, *, tiles: Tiles, scale
):
    queries, segments, prefix = q[...], seg_q[...], pre_q[...]
    lse, delta, d_out = lse[...], delta[...], d_out[...]
    first = pl.program_id(0) * tiles.queries

    def visit(masked, j, sum_d_q):
        at = pl.ds(j * tiles.keys, tiles.keys)
        keys = k[at, :]
        visible = masked and _visible(segments, prefix, seg[at], first, j * tiles.keys)
        weights = jnp.exp2(_scores(queries, keys, scale, visible) - lse[:, None])
        d_weights = dot(d_out, v[at, :], contract=(1, 1))
        d_scores = weights * (d_weights - delta[:, None])
        return sum_d_q + dot(d_scores.astype(keys.dtype), keys, contract=(1, 0))

    d_q[...] = (_over_keys(ranges, visit, jnp.zeros(q.shape)) * scale).astype(d_q.dtype)


def _d_keys_kernel(
    q, k, v, seg, pre, seg_k, ranges, d_out, lse, delta, d_k, d_v, *, tiles: Tiles, scale
):
    first, keys, values, segments = pl.program_id(0) * tiles.keys, k[...], v[...], seg_k[...]

    def visit(head, masked, i, carry):
        sum_d_k, sum_d_v = carry
        at = pl.ds(i * tiles.queries, tiles.queries)
        queries, d_mixed = q[at, head, :], d_out[at, head, :]
        visible = masked and _visible(seg[at], pre[at], segments, i * tiles.queries, first)
        scores = _scores(queries, keys, scale, visible)
        weights = jnp.exp2(scores - lse[head, at][:, None])
        sum_d_v += dot(weights.astype(d_mixed.dtype), d_mixed, contract=(0, 0))
        d_weights = dot(d_mixed, values, contract=(1, 1))
        d_scores = weights * (d_weights - delta[head, at][:, None])
        return sum_d_k + dot(d_scores.astype(queries.dtype), queries, contract=(0, 0)), sum_d_v

    carry = jnp.zeros(k.shape), jnp.zeros(v.shape)
    for head in range(q.shape[1]):  # those that share the keys
        carry = _over([ranges[n] for n in range(4)], partial(visit, head), carry)
    d_k[...] = (carry[0] * scale).astype(d_k.dtype)
    d_v[...] = carry[1].astype(d_v.dtype)


def _call(kernel, tiles: Tiles, grid, in_specs, out_specs, out_shape, interpret, arrays) -> Any:
    scale = 1 / math.sqrt(arrays[0].shape[-1])
    parameters = triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(
        partial(kernel, tiles=tiles, scale=scale), grid=grid, in_specs=in_specs,
        out_specs=out_specs, out_shape=out_shape, compiler_params=parameters, interpret=interpret,
    )(*arrays)  # fmt: skip


def _specs(shape_BSHd, heads_of_keys: int, tiles: Tiles):
    """Blocks of an array by the grid (block of queries, query head, row)."""
    _, s, h, d = shape_BSHd
    group = h // heads_of_keys
    tokens = pl.BlockSpec((None, tiles.queries), lambda i, n, b: (b, i))
    rows = pl.BlockSpec((None, tiles.queries, None, d), lambda i, n, b: (b, i, n, 0))
    whole = pl.BlockSpec((None, s, None, d), lambda i, n, b: (b, 0, n // group, 0))
    ranges = pl.BlockSpec((None, None, 6), lambda i, n, b: (b, i, 0))
    segments = pl.BlockSpec((None, s), lambda i, n, b: (b, 0))
    scalars = pl.BlockSpec((None, None, tiles.queries), lambda i, n, b: (b, n, i))
    return [rows, whole, whole, tokens, tokens, segments, ranges], rows, scalars


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal(kernels, interpret, q, k, v, segments, prefix):
    return _forward(kernels, interpret, q, k, v, segments, prefix)[0]


def _forward(kernels, interpret, q, k, v, segments, prefix):
    tiles = kernels.forward
    b, s, h, _ = q.shape
    in_specs, rows, scalars = _specs(q.shape, k.shape[2], tiles)
    ranges = _ranges(segments, prefix, tiles.queries, tiles.keys)[0]
    shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, s), jnp.float32)
    arrays = q, k, v, segments, prefix, segments, ranges
    grid = s // tiles.queries, h, b
    out, lse = _call(
        _forward_kernel, tiles, grid, in_specs, (rows, scalars), shapes, interpret, arrays
    )
    out, lse = (checkpoint_name(x, SAVED) for x in (out, lse))
    return out, (q, k, v, segments, prefix, out, lse)


def _backward(kernels, interpret, saved, d_out):
    q, k, v, segments, prefix, out, lse = saved
    b, s, h, d = q.shape
    kv, group = k.shape[2], h // k.shape[2]
    delta = jnp.einsum(
        "bshd,bshd->bhs", out, d_out, preferred_element_type=jnp.float32, precision=HIGHEST
    )
    tiles = kernels.d_queries
    in_specs, rows, scalars = _specs(q.shape, kv, tiles)
    ranges = _ranges(segments, prefix, tiles.queries, tiles.keys)[0]
    d_q = _call(
        _d_queries_kernel, tiles, (s // tiles.queries, h, b),
        [*in_specs, rows, scalars, scalars], rows, jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret, (q, k, v, segments, prefix, segments, ranges, d_out, lse, delta),
    )  # fmt: skip
    tiles = kernels.d_keys
    ranges = _ranges(segments, prefix, tiles.queries, tiles.keys)[1]
    whole = pl.BlockSpec((None, s, group, d), lambda j, n, b: (b, 0, n, 0))
    block = pl.BlockSpec((None, tiles.keys, None, d), lambda j, n, b: (b, j, n, 0))
    tokens = pl.BlockSpec((None, s), lambda j, n, b: (b, 0))
    own = pl.BlockSpec((None, tiles.keys), lambda j, n, b: (b, j))
    pair = pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0))
    scalars = pl.BlockSpec((None, group, s), lambda j, n, b: (b, n, 0))
    d_k, d_v = _call(
        _d_keys_kernel, tiles, (s // tiles.keys, kv, b),
        [whole, block, block, tokens, tokens, own, pair, whole, scalars, scalars],
        (block, block), tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        interpret, (q, k, v, segments, prefix, segments, ranges, d_out, lse, delta),
    )  # fmt: skip
    return d_q, d_k, d_v, None, None


_causal.defvjp(_forward, _backward)


def causal(
    q_BSHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    segments_BS: jax.Array,
    prefix_BS: jax.Array | None = None,
    *,
    kernels: Kernels | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.causal`; pads see nothing and get 0; ``interpret`` runs it on any platform."""
    s = q_BSHd.shape[1]
    kernels = kernels or (SINGLE if q_BSHd.dtype == jnp.float32 else HALF)
    padding = -s % max(size for tiles in kernels for size in tiles[:2])
    prefix_BS = jnp.zeros_like(segments_BS) if prefix_BS is None else prefix_BS
    arrays = q_BSHd, k_BSKd, v_BSKd, segments_BS, prefix_BS
    arrays = (jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in arrays)
    return _causal(kernels, interpret, *arrays)[:, :s]
