"""Rotary positions and attention: causal over rows for the learner, cached for the sampler."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from sapo_jax.model import blocked, flash, rope, splash
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives

HIGHEST = jax.lax.Precision.HIGHEST
PLATFORMS = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}  # kernels of one
SHARES_PREFIX = (
    "blocked",
    "triton",
    "xla",
)  # kernels whose rows may share a prefix, see `segments`
SHORT = 64  # tokens of rows whose scores are no larger than their queries and keys
NEGATIVE = -1e30  # finite: a row without any key must not give NaN


def einsum(pattern: str, *operands: jax.Array, out=None) -> jax.Array:
    """`jnp.einsum` without TF32 or bf16 passes for f32 inputs; bf16 inputs accumulate in f32."""
    return jnp.einsum(pattern, *operands, precision=HIGHEST, preferred_element_type=out)


def dense(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """Contract the last ``inputs`` axes of x with the first of weight, as one plain matmul.

    XLA's CPU backend transposes before and after a dot over more axes, in the gradients most.
    """
    leading, out = x.shape[: x.ndim - inputs], weight.shape[inputs:]
    flat = jnp.matmul(
        x.reshape(math.prod(leading), -1),
        weight.reshape(math.prod(weight.shape[:inputs]), -1),
        precision=HIGHEST,
    )
    return flat.reshape(*leading, *out)


def rotary(positions_X: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) f32[..., head_dim/2] of RoPE (arXiv 2104.09864) at integer positions."""
    return turn(positions_X.astype(jnp.float32)[..., None], config)


def turn(positions_Xp: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """As `rotary`, with a position for each pair, or one for all, in the last axis."""
    scaling = dict(config.rope_scaling)
    inverse, factor = rope.frequencies(config.head_dim, config.rope_theta, scaling)
    angle = positions_Xp * inverse
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_XHd: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the halves of each head: pairs are (i, i + head_dim/2), as Hugging Face has them."""
    cos, sin = (t[..., None, :] for t in cos_sin)
    first, second = jnp.split(x_XHd.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x_XHd.dtype)


def _softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=-1)


def check(kernel: str, platform: str) -> None:
    """Refuse a kernel that a platform does not have.

    Raises:
      ValueError: naming the field.
    """
    if PLATFORMS.get(kernel, platform) != platform:
        only = f"must be 'auto', 'blocked' or 'xla' on {platform}, for it is of {PLATFORMS[kernel]}"
        raise ValueError(f"model.attention={kernel!r}: {only}")


def choose(kernel: str, platform: str, length: int, head_dim: int) -> str:
    """The kernel that "auto" takes on a platform for rows of so many tokens."""
    if kernel != "auto":
        return kernel
    if platform == "tpu":
        return "splash"
    if length <= SHORT:
        return "xla"
    return "triton" if platform == "gpu" and flash.supports(head_dim) else "blocked"


def causal(
    q_BSHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    segments_BS: jax.Array,
    kernel: str = "auto",
    prefix_BS: jax.Array | None = None,
    block: int = blocked.BLOCK,
) -> jax.Array:
    """Grouped-query attention of each token to its own sequence up to itself, [B, S, H, d].

    Args:
      q_BSHd, k_BSKd, v_BSKd: rotated queries and keys, and values.
      segments_BS: i32[B, S], 0 at pads.
      kernel: a name in `config.ATTENTION`; "auto" takes splash where the program is compiled for
        TPU, "triton" where it is for GPU, else "blocked", both for rows that are not `SHORT`;
        "cudnn" is for GPU, and for rows of one segment; "xla" materialises the scores and is the
        reference of the others.
      prefix_BS: i32[B, S], the segment that each token's own continues, 0 for none; with
        `SHARES_PREFIX` only.
      block: tokens of a block, at most, see `blocked.block_size`.
    """
    check(kernel, collectives.platform())
    kernel = choose(kernel, collectives.platform(), *q_BSHd.shape[1::2])
    if kernel == "blocked":
        return blocked.causal(q_BSHd, k_BSKd, v_BSKd, segments_BS, prefix_BS, block)
    if kernel == "triton":
        return flash.causal(q_BSHd, k_BSKd, v_BSKd, segments_BS, prefix_BS)
    if prefix_BS is not None and kernel not in SHARES_PREFIX:
        raise ValueError(f"attention={kernel!r}: shared prefixes need one of {SHARES_PREFIX}")
    if kernel == "splash":
        return splash.causal(q_BSHd, k_BSKd, v_BSKd, segments_BS)
    if kernel == "cudnn":
        return fused(q_BSHd, k_BSKd, v_BSKd, segments_BS)
    b, s, h, d = q_BSHd.shape
    kv = k_BSKd.shape[2]
    q = q_BSHd.reshape(b, s, kv, h // kv, d)
    scores = einsum("bskgd,btkd->bkgst", q, k_BSKd, out=jnp.float32) / jnp.sqrt(d)
    index = jnp.arange(s)
    same_BST = segments_BS[:, :, None] == segments_BS[:, None, :]
    if prefix_BS is not None:
        same_BST |= (prefix_BS[:, :, None] == segments_BS[:, None, :]) & (prefix_BS > 0)[..., None]
    visible_BST = same_BST & (index[:, None] >= index[None, :])
    weights = _softmax(scores, visible_BST[:, None, None]).astype(v_BSKd.dtype)
    return einsum("bkgst,btkd->bskgd", weights, v_BSKd).reshape(b, s, h, d)


def whole(q_BSHd, k_BSHd, v_BSHd, segments_BS) -> jax.Array:
    """As `causal`, of each token to all of its segment, by the kernel of the platform."""
    if collectives.platform() == "tpu":
        return splash.causal(q_BSHd, k_BSHd, v_BSHd, segments_BS, whole=True)
    return blocked.causal(q_BSHd, k_BSHd, v_BSHd, segments_BS, whole=True)


def fused(q_BSHd, k_BSKd, v_BSKd, segments_BS, implementation: str = "cudnn") -> jax.Array:
    """As `causal`, by `jax.nn.dot_product_attention`; of each row one segment, then pads."""
    length_B = jnp.sum(segments_BS > 0, -1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q_BSHd, k_BSKd, v_BSKd, is_causal=True, implementation=implementation,
        query_seq_lengths=length_B, key_value_seq_lengths=length_B,
    )  # fmt: skip


def cached(
    q_PGHd: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    completion: tuple[jax.Array, jax.Array],
    prompt_visible_PN: jax.Array,
    completion_visible_PGC: jax.Array,
) -> jax.Array:
    """Attention of one new token a row to its group's prompt and its own completion, [P, G, H, d].

    Args:
      q_PGHd: queries of G rows for each of P prompts.
      prompt: keys and values [P, K, N, d], held once for the group.
      completion: keys and values [P·G, K, C, d]. (With an axis of size 1 in front of them, XLA on
        CPU copies a cache at each step, once for each of its shapes.)
      prompt_visible_PN: positions that hold a prompt token.
      completion_visible_PGC: places that hold a token of the row's present completion.
    """
    p, g, h, d = q_PGHd.shape
    kv, n = prompt[0].shape[1:3]
    r, dtype = p * g, q_PGHd.dtype
    q = q_PGHd.reshape(p, g, kv, h // kv, d)
    keys, values = (x.astype(dtype) for x in prompt)
    own_keys, own_values = (x.astype(dtype) for x in completion)
    of_prompt = einsum("pgkqd,pknd->pgkqn", q, keys, out=jnp.float32)
    own = einsum("rkqd,rkcd->rkqc", q.reshape(r, *q.shape[2:]), own_keys, out=jnp.float32)
    scores = jnp.concatenate([of_prompt.reshape(*own.shape[:-1], n), own], -1) / jnp.sqrt(d)
    prompt_visible_PGN = jnp.broadcast_to(prompt_visible_PN[:, None], (p, g, n))
    visible = jnp.concatenate([prompt_visible_PGN, completion_visible_PGC], -1)
    weights = _softmax(scores, visible.reshape(r, 1, 1, -1)).astype(dtype)
    of_prompt = weights[..., :n].reshape(*q.shape[:-1], n)
    mixed = einsum("pgkqn,pknd->pgkqd", of_prompt, values).reshape(r, *q.shape[2:])
    mixed = mixed + einsum("rkqc,rkcd->rkqd", weights[..., n:], own_values)
    return mixed.reshape(p, g, h, d)
