"""Mixtures of experts: the router, and dropless dispatch to the experts.

Tokens are sorted by expert, each expert's group padded to whole blocks, so that the matmuls follow
the routed tokens whatever the routing is: none is dropped if all go to one expert.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax.model import lora, waves
from sapo_jax.model.attention import einsum
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.grouped import Layout, block_size, layout
from sapo_jax.model.swiglu import swiglu
from sapo_jax.parallel import collectives


@struct.dataclass
class Routing:
    """What a router decided for some tokens, X any axes of tokens."""

    experts: jax.Array  # i32[X, k], the experts in use
    own: jax.Array  # i32[X, k], the router's own choice: the same unless replayed
    gates: jax.Array  # f32[X, k], the weights of the experts in use
    probs: jax.Array  # f32[X, E]


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


def _of_this_device(
    weights: waves.Experts,
    config: ModelConfig,
    hidden_TD: jax.Array,
    experts_Tk: jax.Array,
    gates_Tk: jax.Array,
) -> jax.Array:
    """What this device's experts add to the tokens of all devices of `expert`, f32[T, D]."""
    devices, (tokens, k) = collectives.axis_size("expert"), experts_Tk.shape
    here = config.num_experts // devices
    ids_Tk = experts_Tk - collectives.axis_index("expert") * here
    inside_Tk = (ids_Tk >= 0) & (ids_Tk < here)
    # Pairs of other devices are sorted behind the last expert, into rows that nothing reads.
    block = block_size(tokens * k, config.num_experts)
    plan = layout(jnp.where(inside_Tk, ids_Tk, here), here + 1, block)
    sizes_E, blocks = plan.sizes[:-1], plan.expert.size
    wave = min(blocks, waves.blocks_of_wave(tokens * k, devices, here, block))
    padding = -blocks % wave
    rows_M = jnp.arange((blocks + padding) * block)
    source_M = jnp.pad(plan.source, (0, padding * block))
    rows = Layout(
        source=jnp.where(rows_M < jnp.sum(sizes_E), source_M, tokens),
        expert=jnp.minimum(jnp.pad(plan.expert, (0, padding)), here - 1),
        sizes=sizes_E,
    )
    position_Tk = jnp.where(inside_Tk, plan.position, rows_M.size)
    share_M = jnp.zeros(rows_M.size).at[position_Tk].set(gates_Tk, mode="drop")
    return waves.apply(wave * block, hidden_TD, share_M, weights, rows)


def _of_all(
    weights: waves.Experts,
    config: ModelConfig,
    hidden_TD: jax.Array,
    experts_Tk: jax.Array,
    gates_Tk: jax.Array,
) -> jax.Array:
    """The gated sum of each token's experts, f32[T, D]."""
    plan = layout(experts_Tk, config.num_experts)
    x_MD = hidden_TD.at[plan.source].get(mode="fill", fill_value=0)
    gate, up, down = (
        partial(lora.grouped, w, expert=plan.expert, sizes_E=plan.sizes) for w in weights
    )
    inner_MF = swiglu(gate(x_MD), up(x_MD))
    out_TkD = down(inner_MF)[plan.position].astype(jnp.float32)
    return jnp.sum(out_TkD * gates_Tk[..., None], 1)


def experts(
    weights: dict[str, jax.Array], config: ModelConfig, hidden_XD: jax.Array, routing: Routing
) -> jax.Array:
    """The gated sum of each token's experts, each a SwiGLU, [X, D].

    Over the mesh axis `expert`, every device has some of the experts: it gathers the tokens of all,
    computes what its experts add to each (see `waves`), and gets back the sums of its own tokens.
    """
    *leading, d = hidden_XD.shape
    k, dtype = config.num_experts_per_tok, hidden_XD.dtype
    shared = (collectives.copy_to_tensor(hidden_XD.reshape(-1, d)), routing.experts.reshape(-1, k),
              collectives.copy_to_tensor(routing.gates.reshape(-1, k)))  # fmt: skip
    gathered = (collectives.all_gather(x, ("expert",)) for x in shared)
    own = tuple(lora.factors(weights, f"experts_{n}", dtype) for n in ("gate", "up", "down"))
    compute = _of_this_device if collectives.axis_size("expert") > 1 else _of_all
    out_TD = compute(own, config, *gathered)
    out_TD = collectives.reduce_from_tensor(collectives.reduce_scatter(out_TD, ("expert",)))
    return out_TD.astype(dtype).reshape(*leading, d)
