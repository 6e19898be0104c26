"""Attention in blocks that stay in the cache, with a backward pass of its own.

No array of [rows, heads, S, S] exists, and pairs of blocks that the mask hides are not visited:
what lies after the diagonal, other segments of a packed row, pads. The backward pass computes the
weights of a pair again from the log-sum-exp of the scores (as FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
NEGATIVE = -1e30  # finite: a query without any key must not give NaN
BLOCK = 128  # queries and keys of a pair, at most; the least is a quarter
TOKENS = 512  # queries at a time: their scores fit a core's cache


def _einsum(pattern: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, *operands, precision=HIGHEST, preferred_element_type=jnp.float32)


class Rows(NamedTuple):
    """Some rows in n blocks of b tokens, which are visited together.

    Attributes:
      q, k, v: [r, n, b, K, G, d], and [r, n, b, K, d] twice.
      segments, prefix: i32[r, n, b]; see `causal`.
      whole: queries see the keys after them, too.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: jax.Array
    prefix: jax.Array
    whole: bool = False


def _take(x, block, axis: int = 1):
    return jax.lax.dynamic_index_in_dim(x, block, axis, keepdims=False)


def _queries(x_rbKGd):
    """The queries that share a key head as one matrix, [r, K, G·b, d]."""
    r, b, kv, g, d = x_rbKGd.shape
    return jnp.transpose(x_rbKGd, (0, 2, 3, 1, 4)).reshape(r, kv, g * b, d)


def _back(x_rKQd, b: int):
    """The reverse of `_queries`."""
    r, kv, _, d = x_rKQd.shape
    return jnp.transpose(x_rKQd.reshape(r, kv, -1, b, d), (0, 3, 1, 2, 4))


def _visible(rows: Rows, i, j):
    """Which keys of block j the queries of block i see, bool[r, b, b]."""
    segment_rs, prefix_rs = _take(rows.segments, i)[:, :, None], _take(rows.prefix, i)[:, :, None]
    segment_rt = _take(rows.segments, j)[:, None, :]
    index = jnp.arange(rows.k.shape[2])
    causal = rows.whole | (i > j) | (index[:, None] >= index[None, :])
    return causal & (segment_rt > 0) & ((segment_rs == segment_rt) | (prefix_rs == segment_rt))


def _visits(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """For each block of queries, the blocks of keys to visit, first in i32[n, n]; how many, i32[n].

    By the least and greatest id in a block, so that a few are visited in vain.
    """
    n = rows.k.shape[1]

    def bounds(ids):  # ids of a row never fall but at pads, which are 0
        large = jnp.iinfo(ids.dtype).max
        return jnp.min(jnp.where(ids > 0, ids, large), -1), jnp.max(ids, -1)

    low, high = bounds(rows.segments)

    def meets(first, last):
        return (low[:, None, :] <= last[:, :, None]) & (high[:, None, :] >= first[:, :, None])

    own, prefix = meets(low, high), meets(*bounds(rows.prefix))
    index = jnp.arange(n)
    wanted = jnp.any(own | prefix, 0) & (rows.whole | (index[:, None] >= index[None, :]))
    return jnp.argsort(~wanted, axis=-1, stable=True), jnp.sum(wanted, -1, dtype=jnp.int32)


def _scores(rows: Rows, q_rKQd, i, j):
    """Scaled scores, NEGATIVE where a key is hidden, f32[r, K, G, b, b]."""
    scores = _einsum("rKQd,rtKd->rKQt", q_rKQd, _take(rows.k, j)) / jnp.sqrt(q_rKQd.shape[-1])
    r, kv, _, b = scores.shape
    scores = scores.reshape(r, kv, -1, b, b)
    return jnp.where(_visible(rows, i, j)[:, None, None], scores, NEGATIVE)


def _over(visits, i, body, start):
    """``body(j, carry)`` for each block of keys that the queries of block i visit."""
    blocks, counts = visits
    if blocks.shape[0] == 1:
        return body(0, start)
    return jax.lax.fori_loop(0, counts[i], lambda n, carry: body(blocks[i, n], carry), start)


def _forward_rows(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """(out [r, n, b, K, G, d], log-sum-exp of the scores f32[r, n, K, G·b])."""
    r, n, b, kv, g, d = rows.q.shape
    visits = _visits(rows)

    def queries(i):
        q_rKQd = _queries(_take(rows.q, i))

        def visit(j, carry):
            high, total, out = carry
            scores = _scores(rows, q_rKQd, i, j).reshape(r, kv, g * b, b)
            higher = jnp.maximum(high, jnp.max(scores, -1))
            weights = jnp.exp(scores - higher[..., None])
            decay = jnp.exp(high - higher)
            total = total * decay + jnp.sum(weights, -1)
            v_rtKd = _take(rows.v, j)
            mixed = _einsum("rKQt,rtKd->rKQd", weights.astype(v_rtKd.dtype), v_rtKd)
            return higher, total, out * decay[..., None] + mixed

        # Above what hides a key: a query without any has weights of 0.
        start = jnp.full((r, kv, g * b), NEGATIVE / 10), jnp.zeros((r, kv, g * b))
        high, total, out = _over(visits, i, visit, (*start, jnp.zeros((r, kv, g * b, d))))
        safe = jnp.where(total > 0, total, 1)
        return _back((out / safe[..., None]).astype(rows.q.dtype), b), high + jnp.log(safe)

    out, lse = jax.lax.map(queries, jnp.arange(n)) if n > 1 else _one(queries)
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(lse, 0, 1)


def _one(queries):
    return jax.tree.map(lambda x: x[None], queries(0))


def _backward_rows(rows: Rows, lse, delta, d_out) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; delta is Σ_d out · d_out, f32[r, n, b, K, G]."""
    r, n, b, kv, g, d = rows.q.shape
    visits, scale = _visits(rows), 1 / jnp.sqrt(jnp.float32(d))

    def queries(carry, i):
        q_rKQd, d_out_rKQd = _queries(_take(rows.q, i)), _queries(_take(d_out, i))
        lse_rKQ = _take(lse, i)
        delta_rKQ = _queries(_take(delta, i)[..., None])[..., 0]

        def visit(j, carry):
            d_q, d_k, d_v = carry
            k_rtKd, v_rtKd = _take(rows.k, j), _take(rows.v, j)
            scores = _scores(rows, q_rKQd, i, j).reshape(r, kv, g * b, b)
            weights = jnp.exp(scores - lse_rKQ[..., None])
            d_weights = _einsum("rKQd,rtKd->rKQt", d_out_rKQd, v_rtKd)
            d_scores = (weights * (d_weights - delta_rKQ[..., None]) * scale).astype(q_rKQd.dtype)
            d_q += _einsum("rKQt,rtKd->rKQd", d_scores, k_rtKd)
            own_k = _einsum("rKQt,rKQd->rtKd", d_scores, q_rKQd)
            own_v = _einsum("rKQt,rKQd->rtKd", weights.astype(v_rtKd.dtype), d_out_rKQd)
            if n == 1:
                return d_q, own_k[:, None], own_v[:, None]
            return (
                d_q,
                d_k.at[:, j].add(own_k, mode="promise_in_bounds"),
                d_v.at[:, j].add(own_v, mode="promise_in_bounds"),
            )

        start = jnp.zeros((r, kv, g * b, d))
        d_q, *carry = _over(visits, i, visit, (start, *carry))
        return tuple(carry), _back(d_q.astype(rows.q.dtype), b)

    start = jnp.zeros(rows.k.shape), jnp.zeros(rows.v.shape)
    (d_k, d_v), d_q = jax.lax.scan(queries, start, jnp.arange(n), unroll=n == 1)
    return jnp.moveaxis(d_q, 0, 1), d_k.astype(rows.k.dtype), d_v.astype(rows.v.dtype)


def block_size(segment: int) -> int:
    """Tokens of a block for segments of so many: small enough to skip most of what is hidden."""
    block = BLOCK
    while block > BLOCK // 4 and 2 * block > segment:
        block //= 2
    return block


def _chunks(block: int, x: jax.Array) -> jax.Array:
    """[B, S, …] as [B/r, r, n, b, …], where r rows are visited together; b is at most a block."""
    rows, s, *rest = x.shape
    b = -(-s // (8 * -(-s // block))) * 8
    r = max(r for r in range(1, max(1, TOKENS // b) + 1) if rows % r == 0)
    x = jnp.pad(x, ((0, 0), (0, -s % b), *((0, 0) for _ in rest)))
    return x.reshape(rows // r, r, -1, b, *rest)


def _joined(x: jax.Array, s: int) -> jax.Array:
    """The reverse of `_chunks`."""
    chunks, r, n, b, *rest = x.shape
    return x.reshape(chunks * r, n * b, *rest)[:, :s]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(block, whole, q, k, v, segments, prefix):
    return _forward(block, whole, q, k, v, segments, prefix)[0]


def _forward(block, whole, *arrays):
    chunks = tuple(_chunks(block, x) for x in arrays)
    out, lse = jax.lax.map(lambda x: _forward_rows(Rows(*x, whole)), chunks)
    out = _joined(out, arrays[0].shape[1])
    return out, (arrays, out, lse)


def _backward(block, whole, saved, d_out):
    arrays, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    *rows, delta, d_out = (_chunks(block, x) for x in (*arrays, delta, d_out))
    grads = jax.lax.map(
        lambda x: _backward_rows(Rows(*x[:-3], whole), *x[-3:]), (*rows, lse, delta, d_out)
    )
    return *(_joined(g, out.shape[1]) for g in grads), None, None


_attention.defvjp(_forward, _backward)


def causal(
    q_BSHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    segments_BS: jax.Array,
    prefix_BS: jax.Array | None = None,
    block: int = BLOCK,
    whole: bool = False,
) -> jax.Array:
    """As `attention.causal`, or `attention.whole`; pads see nothing and get 0."""
    b, s, h, d = q_BSHd.shape
    kv = k_BSKd.shape[2]
    prefix_BS = jnp.zeros_like(segments_BS) if prefix_BS is None else prefix_BS
    q_BSKGd = q_BSHd.reshape(b, s, kv, h // kv, d)
    return _attention(block, whole, q_BSKGd, k_BSKd, v_BSKd, segments_BS, prefix_BS).reshape(
        b, s, h, d
    )
