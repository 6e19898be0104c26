"""The Qwen3 decoder as pure functions; one definition of a layer for learner and sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model import attention
from sapo_jax.model.attention import dense, einsum
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.params import head_weight


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, computed in f32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer(
    weights: dict[str, jax.Array],
    config: ModelConfig,
    x_XD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: Callable,
) -> jax.Array:
    """One pre-norm layer: grouped-query attention with QK-norm, then SwiGLU.

    Args:
      weights: one layer of the parameter table.
      config: the model's shape.
      x_XD: the residual stream, any leading axes.
      rope: from `attention.rotary`, at the positions of x.
      attend: (q, k, v) [..., heads, d] → [..., H, d]; the only part that differs between the
        learner, prefill and decoding.
    """
    dtype, eps = jnp.dtype(config.compute_dtype), config.rms_norm_eps
    w = {name: value.astype(dtype) for name, value in weights.items()}
    h = rms_norm(x_XD, weights["attn_norm"], eps)
    q, k, v = (dense(h, w[name]) for name in ("q", "k", "v"))
    q = attention.rotate(rms_norm(q, weights["q_norm"], eps), rope)
    k = attention.rotate(rms_norm(k, weights["k_norm"], eps), rope)
    x_XD = x_XD + dense(attend(q, k, v), w["o"], 2)
    h = rms_norm(x_XD, weights["mlp_norm"], eps)
    return x_XD + dense(jax.nn.silu(dense(h, w["gate"])) * dense(h, w["up"]), w["down"])


def embed(params: Any, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Token embeddings in the compute dtype."""
    return params["embed"].astype(config.compute_dtype)[tokens]


def hidden(
    params: Any,
    config: ModelConfig,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    *,
    remat: bool = False,
) -> jax.Array:
    """Final hidden states [B, S, D]; entry s has seen the tokens of its segment up to s.

    Layers are scanned; with ``remat`` the backward pass recomputes each layer from its input.
    """
    rope = attention.rotary(attention.positions(segments_BS), config.head_dim, config.rope_theta)

    def step(x_BSD, weights):
        def attend(q, k, v):
            return attention.causal(q, k, v, segments_BS)

        return layer(weights, config, x_BSD, rope, attend), None

    x_BSD = embed(params, config, tokens_BS)
    x_BSD, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x_BSD, params["layers"])
    return rms_norm(x_BSD, params["final_norm"], config.rms_norm_eps)


def logits_of(params: Any, config: ModelConfig, hidden_XD: jax.Array) -> jax.Array:
    """Logits f32[..., V] of final hidden states."""
    weight_VD = head_weight(params).astype(config.compute_dtype)
    return einsum("...D,VD->...V", hidden_XD, weight_VD, out=jnp.float32)


def logits(params: Any, config: ModelConfig, tokens_BS: jax.Array) -> jax.Array:
    """Causal logits f32[B, S, V] of left-aligned rows; for tests and inspection.

    Training never forms this array: see `head`.
    """
    segments_BS = jnp.ones_like(tokens_BS)
    return logits_of(params, config, hidden(params, config, tokens_BS, segments_BS))
