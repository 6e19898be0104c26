"""Kernels of attention against each other: errors in f32 and bf16, and times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gpu.timing import attempt, compiled, random, seconds
from sapo_jax.model import attention, flash

HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
TILES = {  # tried for the forward pass, and for each part of the backward pass
    "forward": [
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 3),
        (128, 32, 4, 4),
    ],
    "d_queries": [
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (128, 32, 8, 3),
        (64, 32, 4, 3),
        (64, 128, 8, 2),
    ],
    "d_keys": [(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3), (64, 64, 8, 3)],
}


def arrays(rows: int, length: int, dtype: Any, heads=(HEADS, KV_HEADS, HEAD_DIM)):
    """Queries, keys and values."""
    h, k, d = heads
    return tuple(random(i, rows, length, n, d, dtype=dtype) for i, n in enumerate((h, k, k)))


def segments(kind: str, rows: int, length: int) -> tuple[jax.Array, jax.Array | None]:
    """Of each row: one segment with pads behind, several, or one that four others continue."""
    index = np.arange(length)
    if kind == "one":
        own = np.where(index < length - 7, 1, 0)
        return jnp.asarray(np.tile(own, (rows, 1)), jnp.int32), None
    ids = jnp.asarray(np.tile(1 + 5 * index // length, (rows, 1)), jnp.int32)
    return ids, jnp.where(ids > 1, 1, 0) if kind == "prefix" else None


def with_gradient(kernel: Callable) -> Callable:
    """The kernel's result and gradients, of a sum that weighs every entry."""

    def run(q, k, v, weight, ids, prefix):
        def total(q, k, v):
            out = kernel(q, k, v, ids, prefix_BS=prefix)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return jax.jit(run)


def kernel(name: str) -> Callable:
    """One by its name in `config.ATTENTION`."""
    if name == "cudnn":  # which has no prefixes
        return lambda *x, prefix_BS: attention.causal(*x, kernel=name)
    return partial(attention.causal, kernel=name)


def error(name: str, dtype: Any, kind: str, length: int) -> dict[str, Any]:
    """Relative errors of the result and of each gradient, by norms, against f32 scores of rows."""
    q, k, v = arrays(2, length, dtype, (4, 2, 64))
    ids, prefix = segments(kind, 2, length)
    weight = random(9, *q.shape, dtype=jnp.float32) * (ids > 0)[..., None, None]
    exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
    want = with_gradient(kernel("xla"))(*exact, weight, ids, prefix)
    got = with_gradient(kernel(name))(q, k, v, weight, ids, prefix)
    found = {}
    for part, x, y in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        x, y = (np.asarray(z, np.float32) * (part != "out" or np.asarray(ids > 0)[..., None, None])
                for z in (x, y))  # fmt: skip
        found[part] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    return found


def times(name: str, kind: str, rows: int, length: int) -> dict[str, Any]:
    """Seconds of the forward pass, and with the gradient; the FLOPs are those of a causal row."""
    q, k, v = arrays(rows, length, jnp.bfloat16)
    ids, prefix = segments(kind, rows, length)
    weight = random(9, *q.shape)
    forward, _ = compiled(jax.jit(partial(kernel(name), prefix_BS=prefix)), q, k, v, ids)
    both, facts = compiled(with_gradient(kernel(name)), q, k, v, weight, ids, prefix)
    flops = 2 * rows * HEADS * length**2 * HEAD_DIM
    one = seconds(lambda: forward(q, k, v, ids), inner=5)
    two = seconds(lambda: both(q, k, v, weight, ids, prefix), inner=5)
    rates = {"flops_per_s": flops / one, "gradient_flops_per_s": 3.5 * flops / two}
    return {"forward_s": one, "gradient_s": two, **rates, **facts}


def tiles(part: str, sizes: tuple, rows: int, length: int) -> dict[str, Any]:
    """Seconds of the forward pass, or with the gradient, by other tiles of one kernel."""
    q, k, v = arrays(rows, length, jnp.bfloat16)
    ids, _ = segments("one", rows, length)
    own = flash.HALF._replace(**{part: flash.Tiles(*sizes)})
    call = partial(flash.causal, kernels=own)
    if part == "forward":
        program = jax.jit(call).lower(q, k, v, ids).compile()
        return {"seconds": seconds(lambda: program(q, k, v, ids), inner=5)}
    grad = jax.jit(jax.grad(lambda *x: call(*x, ids).astype(jnp.float32).sum(), (0, 1, 2)))
    program = grad.lower(q, k, v).compile()
    return {"seconds": seconds(lambda: program(q, k, v), inner=5)}


def compile_all(toy: bool) -> None:
    """Emit errors: nothing is timed now."""
    length = 96 if toy else 1000
    for dtype in (jnp.float32, jnp.bfloat16):
        for kind in ("one", "packed", "prefix"):
            for name in names(toy):
                if name != "cudnn" or (kind == "one" and dtype == jnp.bfloat16):
                    what = {"kernel": name, "dtype": jnp.dtype(dtype).name, "rows": kind}
                    attempt("attention errors", what, partial(error, name, dtype, kind, length))


def names(toy: bool) -> list[str]:
    """Kernels that are compared with "xla"."""
    return ["blocked"] if toy else ["triton", "cudnn"]


def main(toy: bool) -> None:
    """Emit times at two lengths, then times by tile."""
    for rows, length in ((1, 256),) if toy else ((16, 1024), (4, 4096)):
        for name in (*names(toy), "xla"):
            for kind in ("one",) if name == "cudnn" else ("one", "prefix"):
                what = {"kernel": name, "rows": kind, "count": rows, "length": length}
                attempt("attention", what, partial(times, name, kind, rows, length))
    for part, sizes in TILES.items():
        for own in [] if toy else sizes:
            what = {"part": part, "tiles": own}
            attempt("attention tiles", what, partial(tiles, part, own, 4, 4096))
