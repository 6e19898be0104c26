"""The grouped matmuls of `grouped` for GPU: a tile of the result after the other (Pallas, Triton).

A block has rows of one expert only, so that a tile needs one matrix, whose number it reads. Rows
behind the last expert's are not computed.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sapo_jax.model.flash import dot

LEAST = 16  # rows, columns and depth of a tile: what a tensor core takes


def _tile(size: int, most: int) -> int:
    """The largest power of 2 up to ``most`` that divides."""
    return min(size & -size, most)


def supports(*sizes: int) -> bool:
    """Whether tiles divide such sizes."""
    return all(size % LEAST == 0 for size in sizes)


def _parameters(dtype, width: int):
    wide = width >= 128 and dtype != jnp.float32
    return triton.CompilerParams(num_warps=8 if wide else 4, num_stages=4 if wide else 2)


def _multiply_kernel(x, w, expert, rows, out, *, depth: int, tiles: int, transpose: bool):
    i = pl.program_id(1)
    own = expert[i // tiles]

    def visit(k, total):
        at = pl.ds(k * depth, depth)
        matrix = w[own, :, at] if transpose else w[own, at, :]
        return total + dot(x[:, at], matrix, contract=(1, 1 if transpose else 0))

    used = i * x.shape[0] < rows[0]
    steps = jnp.where(used, jnp.int32(x.shape[1] // depth), 0)
    total = jax.lax.fori_loop(jnp.int32(0), steps, visit, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


def multiply(x_MD, w_EDF, expert, sizes_E, *, transpose: bool = False, interpret: bool = False):
    """As `grouped.multiply`."""
    rows, inner = x_MD.shape
    experts, *sides = w_EDF.shape
    outer = sides[0] if transpose else sides[1]
    block = rows // expert.shape[0]
    most = 64 if x_MD.dtype == jnp.float32 else 128
    height, width, depth = _tile(block, most), _tile(outer, most), _tile(inner, most // 2)
    # Tiles of one block of rows run side by side: its rows and its matrix are read from the cache.
    if transpose:
        matrices = pl.BlockSpec((experts, width, inner), lambda j, i: (0, j, 0))
    else:
        matrices = pl.BlockSpec((experts, inner, width), lambda j, i: (0, 0, j))
    whole = (pl.BlockSpec((n,), lambda j, i: (0,)) for n in (expert.shape[0], 1))
    kernel = partial(_multiply_kernel, depth=depth, tiles=block // height, transpose=transpose)
    return pl.pallas_call(
        kernel,
        grid=(outer // width, rows // height),
        in_specs=[pl.BlockSpec((height, inner), lambda j, i: (i, 0)), matrices, *whole],
        out_specs=pl.BlockSpec((height, width), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outer), x_MD.dtype),
        compiler_params=_parameters(x_MD.dtype, min(height, width)),
        interpret=interpret,
    )(x_MD, w_EDF, expert.astype(jnp.int32), jnp.sum(sizes_E, keepdims=True, dtype=jnp.int32))


def _weight_gradient_kernel(x, y, range_, out, *, height: int):
    def visit(i, total):
        at = pl.ds(i * height, height)
        return total + dot(x[at, :], y[at, :], contract=(0, 0))

    total = jnp.zeros(out.shape, jnp.float32)
    out[...] = jax.lax.fori_loop(range_[0], range_[1], visit, total).astype(out.dtype)


def weight_gradient(x_MD, y_MF, expert, sizes_E, *, interpret: bool = False):
    """As `grouped.weight_gradient`."""
    (rows, d), f = x_MD.shape, y_MF.shape[1]
    most = 64 if x_MD.dtype == jnp.float32 else 128
    height = _tile(rows // expert.shape[0], most // 2)
    tiles = _tile(d, most), _tile(f, most)
    stop_E = jnp.cumsum(sizes_E)
    ranges = jnp.stack([stop_E - sizes_E, stop_E], -1) // height
    return pl.pallas_call(
        partial(_weight_gradient_kernel, height=height),
        grid=(f // tiles[1], d // tiles[0], sizes_E.shape[0]),
        in_specs=[
            pl.BlockSpec((rows, tiles[0]), lambda j, i, e: (0, i)),
            pl.BlockSpec((rows, tiles[1]), lambda j, i, e: (0, j)),
            pl.BlockSpec((None, 2), lambda j, i, e: (e, 0)),
        ],
        out_specs=pl.BlockSpec((None, *tiles), lambda j, i, e: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((sizes_E.shape[0], d, f), x_MD.dtype),
        compiler_params=_parameters(x_MD.dtype, min(tiles)),
        interpret=interpret,
    )(x_MD, y_MF, ranges.astype(jnp.int32))
