"""Log-probability and entropy of given tokens without a [B·S, V] buffer.

The positions under the mask are gathered and visited in chunks, as many as there are; only one
chunk's logits exist at a time. The backward pass recomputes each chunk's logits once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sapo_jax.model import vocab
from sapo_jax.model.attention import einsum
from sapo_jax.parallel import collectives


def _plan(mask_T: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Masked-in positions first, filled up with the out-of-range T; the number of chunks in use.

    T is dropped by scatters, and read as the last position, whose result is dropped as well.
    """
    t = mask_T.shape[0]
    order = jnp.nonzero(mask_T, size=t + (-t) % chunk, fill_value=t)[0].astype(jnp.int32)
    return order, (jnp.sum(mask_T, dtype=jnp.int32) + chunk - 1) // chunk


def _chunk_logits(hidden_TD, weight_VD, targets_T, index_C, temperature):
    h_CD = hidden_TD.at[index_C].get(mode="clip")
    y_C = targets_T.at[index_C].get(mode="clip")
    weight_VD = weight_VD.astype(h_CD.dtype)
    logits_CV = einsum("cD,VD->cV", h_CD, weight_VD, out=jnp.float32) / temperature
    return h_CD, y_C, vocab.log_softmax(logits_CV)


def _entropy(logp_CV):
    return -vocab.sum(jnp.exp(logp_CV) * logp_CV)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def logp_entropy(
    hidden_TD: jax.Array,
    weight_VD: jax.Array,
    targets_T: jax.Array,
    mask_T: jax.Array,
    temperature: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """log π(target) and the entropy of π = softmax(h·Wᵀ / temperature), at positions in the mask.

    Args:
      hidden_TD: final hidden states, in the compute dtype.
      weight_VD: the output matrix, or this device's part of it (see `vocab`).
      targets_T: i32[T], the tokens whose log-probability is wanted.
      mask_T: bool[T]; the rest costs nothing and returns 0.
      temperature: > 0; not differentiated.
      chunk: rows whose logits exist at a time.

    Returns:
      (logp f32[T], entropy f32[T]) in nats; differentiable in hidden_TD and weight_VD.
    """
    return _forward(hidden_TD, weight_VD, targets_T, mask_T, temperature, chunk)[0]


def _forward(hidden_TD, weight_VD, targets_T, mask_T, temperature, chunk):
    order, chunks = _plan(mask_T, chunk)

    def visit(i, out):
        index_C = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        _, y_C, logp_CV = _chunk_logits(hidden_TD, weight_VD, targets_T, index_C, temperature)
        logp_C = vocab.pick(logp_CV, y_C)
        logp_T, entropy_T = out
        return (
            logp_T.at[index_C].set(logp_C, mode="drop"),
            entropy_T.at[index_C].set(_entropy(logp_CV), mode="drop"),
        )

    zeros_T = jnp.zeros(mask_T.shape, jnp.float32)
    out = jax.lax.fori_loop(0, chunks, visit, (zeros_T, zeros_T))
    return out, (hidden_TD, weight_VD, targets_T, mask_T, temperature)


def _backward(chunk, saved, cotangents):
    hidden_TD, weight_VD, targets_T, mask_T, temperature = saved
    d_logp_T, d_entropy_T = cotangents
    order, chunks = _plan(mask_T, chunk)

    def visit(i, grads):
        d_hidden_TD, d_weight_VD = grads
        index_C = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        h_CD, y_C, logp_CV = _chunk_logits(hidden_TD, weight_VD, targets_T, index_C, temperature)
        p_CV = jnp.exp(logp_CV)
        part = logp_CV.shape[-1]
        one_hot_CV = y_C[:, None] == vocab.offset(part) + jnp.arange(part)
        a_C1, b_C1 = (
            d.at[index_C].get(mode="fill", fill_value=0)[:, None] for d in (d_logp_T, d_entropy_T)
        )
        entropy_C1 = _entropy(logp_CV)[:, None]
        # With z the logits: ∂ log p_y/∂z = 1_y − p and ∂H/∂z = −p·(log p + H).
        d_logits_CV = a_C1 * (one_hot_CV - p_CV) - b_C1 * p_CV * (logp_CV + entropy_C1)
        d_logits_CV = (d_logits_CV / temperature).astype(h_CD.dtype)
        d_h_CD = einsum("cV,VD->cD", d_logits_CV, weight_VD.astype(h_CD.dtype))
        d_w_VD = einsum("cV,cD->VD", d_logits_CV, h_CD, out=jnp.float32)
        return d_hidden_TD.at[index_C].set(d_h_CD, mode="drop"), d_weight_VD + d_w_VD

    start = (jnp.zeros_like(hidden_TD), jnp.zeros(weight_VD.shape, jnp.float32))
    d_hidden_TD, d_weight_VD = jax.lax.fori_loop(0, chunks, visit, start)
    # Each device of `tensor` has its own rows of the weight, but a part of every h's gradient.
    d_hidden_TD = collectives.psum(d_hidden_TD, vocab.TENSOR)
    d_weight_VD = d_weight_VD.astype(weight_VD.dtype)
    return d_hidden_TD, d_weight_VD, None, None, jnp.zeros_like(temperature)


logp_entropy.defvjp(_forward, _backward)
