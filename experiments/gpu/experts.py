"""Grouped matmuls: ours by Triton, `jax.lax.ragged_dot`, and a dense product of as many FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu.timing import attempt, compiled, random, seconds
from sapo_jax.model import grouped

# tokens, experts per token, experts, hidden, width: Qwen3-30B-A3B's in an update and in decoding
SIZES = {"update": (8192, 8, 128, 2048, 768), "decoding": (256, 8, 128, 2048, 768)}
TOY = {"update": (256, 2, 8, 64, 32)}


def operands(tokens: int, k: int, experts: int, d: int, f: int) -> tuple:
    """Rows by the layout of a random routing, matrices, and what the layout says."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, experts)), -1)[:, :k].astype(np.int32)
    plan = jax.jit(grouped.layout, static_argnums=1)(jnp.asarray(chosen), experts)
    x = random(0, tokens, d).at[plan.source].get(mode="fill", fill_value=0)
    w = random(1, experts, d, f) * d**-0.5
    return x, w, plan.expert, plan.sizes


def ragged(x, w, expert, sizes):
    """XLA's own."""
    return jax.lax.ragged_dot(x, w, sizes)


def measure(function: Callable, sizes: tuple) -> dict[str, Any]:
    """Times of the product and of its gradient; FLOPs count the routed rows alone."""
    x, w, expert, group_sizes = operands(*sizes)
    tokens, k, _, d, f = sizes
    forward, _ = compiled(jax.jit(function), x, w, expert, group_sizes)
    grad = jax.grad(lambda x, w, *rest: function(x, w, *rest).astype(jnp.float32).sum(), (0, 1))
    both, facts = compiled(jax.jit(grad), x, w, expert, group_sizes)
    one = seconds(lambda: forward(x, w, expert, group_sizes), inner=5)
    two = seconds(lambda: both(x, w, expert, group_sizes), inner=5)
    flops = 2 * tokens * k * d * f
    out = forward(x, w, expert, group_sizes)
    used = int(group_sizes.sum())
    exact = jax.jit(grouped._by_blocks)(x, w, expert, group_sizes)
    gap = (out - exact).astype(jnp.float32)[:used]
    wrong = float(jnp.linalg.norm(gap) / jnp.linalg.norm(exact.astype(jnp.float32)[:used]))
    return {
        "forward_s": one, "gradient_s": two, "rows": x.shape[0], "block": x.shape[0] // expert.size,
        "flops_per_s": flops / one, "gradient_flops_per_s": 2 * flops / two,
        "relative_error": wrong, **facts,
    }  # fmt: skip


def dense(sizes: tuple) -> dict[str, Any]:
    """One matrix for all rows."""
    tokens, k, _, d, f = sizes
    x, w = random(0, tokens * k, d), random(1, d, f)
    multiply = jax.jit(jnp.matmul)
    return {"flops_per_s": 2 * tokens * k * d * f / seconds(lambda: multiply(x, w), inner=5)}


def main(toy: bool) -> None:
    """Emit a line for each way and size."""
    for name, sizes in (TOY if toy else SIZES).items():
        attempt("experts", {"way": "dense", "size": name}, partial(dense, sizes))
        for way, function in (("ours", grouped.grouped_matmul), ("ragged_dot", ragged)):
            attempt("experts", {"way": way, "size": name}, partial(measure, function, sizes))
