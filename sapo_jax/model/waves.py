"""Experts of a device that has some of them: any routing, with memory for about a fair share.

The rows of its experts are visited in waves of a bounded size: one where devices are as busy as
each other, more where this one is chosen more often. The activations of the first wave are kept for
the backward pass, those of others, which are rare, are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model import lora
from sapo_jax.model.grouped import Layout
from sapo_jax.model.swiglu import swiglu

LOAD = 1.25  # rows of a wave ÷ those of a balanced load
FEW = 4096  # rows that are one wave whatever their load: their memory is small


Experts = tuple[tuple[jax.Array, ...], ...]  # of gate, up and down what `lora.factors` gives


def blocks_of_wave(pairs: int, devices: int, experts: int, block: int) -> int:
    """Blocks of a wave, for (token, expert) pairs of all devices and experts of this one."""
    fair = -(-int(LOAD * pairs) // (devices * block)) + experts
    return max(fair, -(-FEW // block))


def _slice(x: jax.Array, wave: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, wave * size, size)


def _wave(rows: Layout, wave: Any, size: int) -> Layout:
    ends = jnp.cumsum(rows.sizes)
    start, stop = wave * size, (wave + 1) * size
    sizes = jnp.clip(ends, start, stop) - jnp.clip(ends - rows.sizes, start, stop)
    blocks = size * rows.expert.size // rows.source.size
    return Layout(_slice(rows.source, wave, size), _slice(rows.expert, wave, blocks), sizes)


def _up(own: Layout, hidden_TD: jax.Array, weights: Experts) -> tuple[jax.Array, ...]:
    """A wave's rows, and what the gates and up projections make of them."""
    x_CD = hidden_TD.at[own.source].get(mode="fill", fill_value=0)
    return x_CD, *(lora.grouped(w, x_CD, own.expert, own.sizes) for w in weights[:2])


def _others(rows: Layout, size: int, body: Callable, carry: Any) -> Any:
    """``body(wave, carry)`` of the waves after the first, as many as there are."""
    if size == rows.source.size:
        return carry
    with jax.named_scope("waves"):
        return jax.lax.fori_loop(1, -(-jnp.sum(rows.sizes) // size), body, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(
    size: int, hidden_TD: jax.Array, share_M: jax.Array, weights: Experts, rows: Layout
) -> jax.Array:
    """Σ over the rows of each token, share · down(silu(gate(h)) · up(h)), f32[T, D].

    Args:
      size: rows of a wave, whole blocks, which divides M.
      hidden_TD: tokens.
      share_M: f32[M], what each row counts.
      weights: of this device's experts, in the dtype of ``hidden_TD``.
      rows: where they come from.
    """
    return _forward(size, hidden_TD, share_M, weights, rows)[0]


def _forward(size, hidden_TD, share_M, weights, rows):
    def add(wave, out_TD, own, gate, up):
        y_CD = lora.grouped(weights[2], swiglu(gate, up), own.expert, own.sizes)
        y_CD = y_CD.astype(jnp.float32) * _slice(share_M, wave, size)[:, None]
        return out_TD.at[own.source].add(y_CD, mode="drop")

    def visit(wave, out_TD):
        own = _wave(rows, wave, size)
        return add(wave, out_TD, own, *_up(own, hidden_TD, weights)[1:])

    own = _wave(rows, 0, size)
    first = _up(own, hidden_TD, weights)
    out_TD = add(0, jnp.zeros(hidden_TD.shape), own, *first[1:])
    out_TD = _others(rows, size, visit, out_TD)
    return out_TD, (hidden_TD, share_M, weights, rows, first)


def _backward(size, saved, d_out_TD):
    hidden_TD, share_M, weights, rows, first = saved
    dtype = hidden_TD.dtype

    def gradients(wave, own, x_CD, gate, up):
        def pull_through(weight, x):
            return jax.vjp(lambda w, x: lora.grouped(w, x, own.expert, own.sizes), weight, x)[1]

        d_CD = d_out_TD.at[own.source].get(mode="fill", fill_value=0)
        share_C = _slice(share_M, wave, size)
        inner, pull = jax.vjp(swiglu, gate, up)
        pull_down = pull_through(weights[2], inner)
        _, d_inner = pull_down(d_CD.astype(dtype))
        d_share_C = jnp.sum(inner.astype(jnp.float32) * d_inner.astype(jnp.float32), -1)
        d_gate_up = pull((share_C[:, None] * d_inner).astype(dtype))
        d_y = (share_C[:, None] * d_CD).astype(dtype)
        each = [pull_through(w, x_CD)(d) for w, d in zip(weights, d_gate_up, strict=False)]
        d_x = sum(x.astype(jnp.float32) for _, x in each)
        return d_x, d_share_C, (*(w for w, _ in each), pull_down(d_y)[0])

    def add(wave, carry, own, activations):
        d_hidden_TD, d_share_M, d_weights = carry
        d_x, d_share_C, more = gradients(wave, own, *activations)
        d_share_M = jax.lax.dynamic_update_slice_in_dim(d_share_M, d_share_C, wave * size, 0)
        d_hidden_TD = d_hidden_TD.at[own.source].add(d_x, mode="drop")
        return d_hidden_TD, d_share_M, jax.tree.map(jnp.add, d_weights, more)

    def visit(wave, carry):
        own = _wave(rows, wave, size)
        return add(wave, carry, own, _up(own, hidden_TD, weights))

    none = jax.tree.map(jnp.zeros_like, (share_M, weights))
    carry = add(0, (jnp.zeros(hidden_TD.shape), *none), _wave(rows, 0, size), first)
    carry = _others(rows, size, visit, carry)
    d_hidden_TD, d_share_M, d_weights = carry
    return d_hidden_TD.astype(dtype), d_share_M, d_weights, None


apply.defvjp(_forward, _backward)
