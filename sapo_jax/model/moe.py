"""Mixtures of experts: the router, dropless dispatch, and the grouped matmuls of the experts.

Tokens are sorted by expert, each expert's group padded to whole blocks, so that the matmuls follow
the routed tokens whatever the routing is: none is dropped if all go to one expert.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax.model.attention import HIGHEST, einsum
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives


@struct.dataclass
class Routing:
    """What a router decided for some tokens, X any axes of tokens."""

    experts: jax.Array  # i32[X, k], the experts in use
    own: jax.Array  # i32[X, k], the router's own choice: the same unless replayed
    gates: jax.Array  # f32[X, k], the weights of the experts in use
    probs: jax.Array  # f32[X, E]


@struct.dataclass
class Layout:
    """Where the rows of the grouped matmuls come from and go to; M rows in blocks of equal size."""

    source: jax.Array  # i32[M], token of each row; T where the row pads a block
    position: jax.Array  # i32[T, k], row of each token's k-th expert
    expert: jax.Array  # i32[blocks], expert of each block
    sizes: jax.Array  # i32[E], rows of each expert, padding included


def id_dtype(config: ModelConfig) -> jnp.dtype:
    """The smallest integer that holds an expert's number, and −1 for none."""
    return jnp.dtype(jnp.int8 if config.num_experts <= 128 else jnp.int16)


def route(
    hidden_XD: jax.Array,
    router_DE: jax.Array,
    config: ModelConfig,
    replay_Xk: jax.Array | None = None,
) -> Routing:
    """Choose k experts a token by softmax probability, in f32.

    Args:
      hidden_XD: normalised hidden states.
      router_DE: the router's matrix, in the dtype of the parameters.
      config: k, and whether the k probabilities are normalised to 1.
      replay_Xk: experts to use instead, −1 where none was recorded; their gates are this router's
        probabilities, so that it keeps its gradient.
    """
    logits = einsum("...D,DE->...E", hidden_XD.astype(jnp.float32), router_DE.astype(jnp.float32))
    probs = jax.nn.softmax(logits, -1)
    own = jax.lax.top_k(probs, config.num_experts_per_tok)[1]
    experts = own
    if replay_Xk is not None:
        experts = jnp.where(replay_Xk >= 0, replay_Xk.astype(jnp.int32), own)
    gates = jnp.take_along_axis(probs, experts, -1)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, -1, keepdims=True)
    return Routing(experts, own, gates, probs)


def differs(first_Xk: jax.Array, second_Xk: jax.Array) -> jax.Array:
    """Whether two choices of k experts are different sets, bool[X]."""
    return jnp.any(jnp.sort(first_Xk, -1) != jnp.sort(second_Xk, -1), -1)


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: an eighth of an expert's mean share, so that padding stays below that."""
    size = 8
    while size < 256 and 16 * size <= rows // experts:
        size *= 2
    return size


def layout(experts_Tk: jax.Array, num_experts: int) -> Layout:
    """Sort the (token, expert) pairs by expert and pad each expert's rows to whole blocks.

    With 3 experts, blocks of 4, and 2, 0 and 5 pairs the rows are ``a a · ·  c c c c  c · · ·``: a
    block has rows of one expert only, so that one matmul with one matrix serves it. Where it begins
    depends on the routing, how many blocks there are does not: shapes are static.
    """
    tokens, k = experts_Tk.shape
    rows = tokens * k
    block = block_size(rows, num_experts)
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


@jax.custom_vjp
def grouped_matmul(
    x_MD: jax.Array, w_EDF: jax.Array, expert: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """Multiply each expert's rows with its matrix, [M, F].

    The platform that the program is compiled for decides how: megablox on TPU, else a loop over
    blocks. ``jax.lax.ragged_dot`` computes every expert for every row on CPU, and in the gradient
    of the weights on TPU; on GPU it may, by XLA's choice.
    """
    return jax.lax.platform_dependent(
        x_MD, w_EDF, expert, sizes_E, tpu=_by_megablox, default=_by_blocks
    )


def _forward(x_MD, w_EDF, expert, sizes_E):
    return grouped_matmul(x_MD, w_EDF, expert, sizes_E), (x_MD, w_EDF, expert, sizes_E)


def _backward(saved, y_MF):
    x_MD, w_EDF, expert, sizes_E = saved
    d_x = jax.lax.platform_dependent(
        y_MF, w_EDF, expert, sizes_E,
        tpu=partial(_by_megablox, transpose=True), default=partial(_by_blocks, transpose=True),
    )  # fmt: skip
    d_w = jax.lax.platform_dependent(
        x_MD, y_MF, expert, sizes_E,
        tpu=_weight_gradient_by_megablox, default=_weight_gradient_by_blocks,
    )  # fmt: skip
    return d_x, d_w.astype(w_EDF.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)


def _local(experts_Tk: jax.Array, gates_Tk: jax.Array, config: ModelConfig):
    """The layout of the pairs whose expert is on this device; the others get no row and gate 0."""
    here = config.num_experts // collectives.axis_size("expert")
    if here == config.num_experts:
        return layout(experts_Tk, here), gates_Tk
    ids_Tk = experts_Tk - collectives.axis_index("expert") * here
    inside_Tk = (ids_Tk >= 0) & (ids_Tk < here)
    # Pairs of other devices are sorted behind the last expert, into rows that nothing reads.
    plan = layout(jnp.where(inside_Tk, ids_Tk, here), here + 1)
    used = jnp.sum(plan.sizes[:-1])
    rows_M = jnp.arange(plan.source.size)
    plan = Layout(
        source=jnp.where(rows_M < used, plan.source, experts_Tk.shape[0]),
        position=jnp.where(inside_Tk, plan.position, plan.source.size),
        expert=jnp.minimum(plan.expert, here - 1),
        sizes=plan.sizes[:-1],
    )
    return plan, jnp.where(inside_Tk, gates_Tk, 0)


def experts(
    weights: dict[str, jax.Array], config: ModelConfig, hidden_XD: jax.Array, routing: Routing
) -> jax.Array:
    """The gated sum of each token's experts, each a SwiGLU, [X, D].

    Over the mesh axis `expert`, every device has some of the experts: it gathers the tokens of all,
    computes what its experts add to each, and gets back the sums of its own tokens. There is room
    for any routing.
    """
    *leading, d = hidden_XD.shape
    k, dtype = config.num_experts_per_tok, hidden_XD.dtype
    shared = (collectives.copy_to_tensor(hidden_XD.reshape(-1, d)), routing.experts.reshape(-1, k),
              collectives.copy_to_tensor(routing.gates.reshape(-1, k)))  # fmt: skip
    hidden_TD, experts_Tk, gates_Tk = (collectives.all_gather(x, ("expert",)) for x in shared)
    plan, gates_Tk = _local(experts_Tk, gates_Tk, config)
    x_MD = hidden_TD.at[plan.source].get(mode="fill", fill_value=0)

    def multiply(x, name):
        return grouped_matmul(x, weights[name].astype(dtype), plan.expert, plan.sizes)

    inner_MF = jax.nn.silu(multiply(x_MD, "experts_gate")) * multiply(x_MD, "experts_up")
    out_MD = multiply(inner_MF, "experts_down")
    if collectives.axis_size("expert") > 1:
        out_TkD = out_MD.at[plan.position].get(mode="fill", fill_value=0)
    else:
        out_TkD = out_MD[plan.position]
    out_TD = jnp.sum(out_TkD.astype(jnp.float32) * gates_Tk[..., None], 1)
    out_TD = collectives.reduce_from_tensor(collectives.reduce_scatter(out_TD, ("expert",)))
    return out_TD.astype(dtype).reshape(*leading, d)
