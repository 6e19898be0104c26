"""Rows sorted by expert, and matmuls of each expert's rows with its own matrix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax.model import grouped_triton
from sapo_jax.model.attention import HIGHEST
from sapo_jax.parallel import collectives


@struct.dataclass
class Layout:
    """Where the rows of the grouped matmuls come from and go to; M rows in blocks of equal size."""

    source: jax.Array  # i32[M], token of each row; T where the row pads a block
    expert: jax.Array  # i32[blocks], expert of each block
    sizes: jax.Array  # i32[E], rows of each expert, padding included
    position: jax.Array | None = None  # i32[T, k], row of each token's k-th expert


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: an eighth of an expert's mean share, so that padding stays below that."""
    size = grouped_triton.LEAST if collectives.platform() == "gpu" else 8
    while size < 256 and 16 * size <= rows // experts:
        size *= 2
    return size


def layout(experts_Tk: jax.Array, num_experts: int, block: int | None = None) -> Layout:
    """Sort the (token, expert) pairs by expert and pad each expert's rows to whole blocks.

    With 3 experts, blocks of 4, and 2, 0 and 5 pairs the rows are ``a a · ·  c c c c  c · · ·``: a
    block has rows of one expert only, so that one matmul with one matrix serves it. Where it begins
    depends on the routing, how many blocks there are does not: shapes are static.
    """
    tokens, k = experts_Tk.shape
    rows = tokens * k
    block = block or block_size(rows, num_experts)
    # The most that any routing needs: every expert in use ends in a block with one row.
    blocks = max(1, (rows + min(num_experts, rows) * (block - 1)) // block)
    flat_R = experts_Tk.reshape(-1)
    order_R = jnp.argsort(flat_R, stable=True)
    count_E = jnp.bincount(flat_R, length=num_experts)
    sizes_E = (count_E + block - 1) // block * block
    # Sorted pair n lies at n, moved on by the padding of the experts before its own.
    shift_E = (jnp.cumsum(sizes_E) - sizes_E) - (jnp.cumsum(count_E) - count_E)
    row_R = jnp.arange(rows) + shift_E[flat_R[order_R]]
    starts = jnp.arange(blocks) * block
    # The expert whose rows reach beyond a block's start; unused blocks at the end are the last's.
    owner = jnp.searchsorted(jnp.cumsum(sizes_E), starts, side="right")
    return Layout(
        source=jnp.full(blocks * block, tokens).at[row_R].set(order_R // k),
        position=jnp.zeros(rows, row_R.dtype).at[order_R].set(row_R).reshape(tokens, k),
        expert=jnp.minimum(owner, num_experts - 1),
        sizes=sizes_E.astype(jnp.int32),
    )


def _by_blocks(x_MD, w_EDF, expert, sizes_E, *, transpose=False):
    """One block after another: all at once would hold a matrix for each block, not each expert."""

    def multiply(_, block):
        x, e = block
        w = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        return None, jnp.matmul(x, w.T if transpose else w, precision=HIGHEST)

    blocks = x_MD.reshape(expert.shape[0], -1, x_MD.shape[-1])
    return jax.lax.scan(multiply, None, (blocks, expert))[1].reshape(x_MD.shape[0], -1)


def _weight_gradient_by_blocks(x_MD, y_MF, expert, sizes_E):
    """Blocks come by expert: each adds to its expert's sum in f32, and the last one's is final."""
    n, d, f = expert.shape[0], x_MD.shape[-1], y_MF.shape[-1]

    def add(carry, block):
        sum_DF, out_EDF, previous = carry
        x, y, e = block
        own_DF = jnp.matmul(x.T, y, precision=HIGHEST, preferred_element_type=jnp.float32)
        sum_DF = jnp.where(e == previous, sum_DF, 0) + own_DF
        out_EDF = jax.lax.dynamic_update_index_in_dim(out_EDF, sum_DF.astype(x.dtype), e, 0)
        return (sum_DF, out_EDF, e), None

    start = jnp.zeros((d, f)), jnp.zeros((sizes_E.shape[0], d, f), x_MD.dtype), expert[0]
    blocks = x_MD.reshape(n, -1, d), y_MF.reshape(n, -1, f), expert
    return jax.lax.scan(add, start, blocks)[0][1]


def _tile(size: int) -> int:
    """Columns of a tile: whole ones only, where that goes, since a part costs as much."""
    return max((n for n in range(128, 1025, 128) if size % n == 0), default=min(size, 512))


def _tiled(expert: jax.Array, *arrays: jax.Array) -> tuple[int, list[jax.Array]]:
    """Rows of a tile of megablox, and the arrays with their rows padded to whole tiles.

    A tile is a block of the layout, so that none has rows of two experts and is computed twice;
    smaller blocks share one.
    """
    tile = max(128, arrays[0].shape[0] // expert.shape[0])
    return tile, [jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) for x in arrays]


def visited_rows(tokens: int, k: int, experts: int, here: int) -> float:
    """Rows that megablox multiplies for ``here`` of the experts, if all are chosen as often.

    Half a block pads each expert's rows; a tile of several blocks is computed once for each expert
    that has one of them.
    """
    block = block_size(tokens * k, here + (here < experts))
    return here * (tokens * k / experts + max(128, block) - block / 2)


def _by_megablox(x_MD, w_EDF, expert, sizes_E, *, transpose=False, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows, (x,) = _tiled(expert, x_MD)
    depth, width = w_EDF.shape[:0:-1] if transpose else w_EDF.shape[1:]
    tiles = (rows, _tile(depth), _tile(width))
    out = gmm(x, w_EDF, sizes_E, x.dtype, tiles, transpose_rhs=transpose, interpret=interpret)
    return out[: x_MD.shape[0]]


def _weight_gradient_by_megablox(x_MD, y_MF, expert, sizes_E, *, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, (x, y) = _tiled(expert, x_MD, y_MF)
    tiles = (rows, _tile(x.shape[1]), _tile(y.shape[1]))
    return tgmm(x.T, y, sizes_E, x.dtype, tiles, interpret=interpret)


def multiply(
    x_MD: jax.Array,
    w_EDF: jax.Array,
    expert: jax.Array,
    sizes_E: jax.Array,
    *,
    transpose: bool = False,
) -> jax.Array:
    """Each expert's rows times its matrix, [M, F], or times its transpose; without a gradient.

    Args:
      x_MD: rows sorted by expert, each expert's in whole blocks.
      w_EDF: a matrix for each expert.
      expert: i32[blocks], expert of each block.
      sizes_E: i32[E], rows of each expert.
      transpose: x is [M, F], the result [M, D].

    The platform that the program is compiled for decides how: megablox on TPU, tiles by Triton on
    GPU, else a loop over blocks. ``jax.lax.ragged_dot`` computes every expert for every row on CPU,
    and in the gradient of the weights on TPU; on GPU it may, by XLA's choice.
    """
    ways = {"tpu": _by_megablox, "cuda": grouped_triton.multiply, "default": _by_blocks}
    return _by_platform(
        {name: partial(way, transpose=transpose) for name, way in ways.items()},
        x_MD, w_EDF, expert, sizes_E,
    )  # fmt: skip


def _by_platform(ways: dict, x_MD, other, expert, sizes_E):
    """The way of the platform, by blocks where Triton has no tile for the sizes."""
    block = x_MD.shape[0] // expert.shape[0]
    if not grouped_triton.supports(block, x_MD.shape[1], *other.shape[1:]):
        del ways["cuda"]
    return jax.lax.platform_dependent(x_MD, other, expert, sizes_E, **ways)


def weight_gradient(
    x_MD: jax.Array, y_MF: jax.Array, expert: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """Σ xᵀy over each expert's rows, [E, D, F]."""
    ways = {
        "tpu": _weight_gradient_by_megablox,
        "cuda": grouped_triton.weight_gradient,
        "default": _weight_gradient_by_blocks,
    }
    return _by_platform(ways, x_MD, y_MF, expert, sizes_E)


@jax.custom_vjp
def grouped_matmul(
    x_MD: jax.Array, w_EDF: jax.Array, expert: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """`multiply` with a gradient."""
    return multiply(x_MD, w_EDF, expert, sizes_E)


def _forward(x_MD, w_EDF, expert, sizes_E):
    return multiply(x_MD, w_EDF, expert, sizes_E), (x_MD, w_EDF, expert, sizes_E)


def _backward(saved, y_MF):
    x_MD, w_EDF, *rest = saved
    d_x = multiply(y_MF, w_EDF, *rest, transpose=True)
    return d_x, weight_gradient(x_MD, y_MF, *rest).astype(w_EDF.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)
