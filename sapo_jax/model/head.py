"""Log-probability, entropy and loss of given tokens without a [T, V] buffer.

The positions under the mask are gathered and visited in chunks, as many as there are; only one
chunk's logits exist at a time. Where a token's loss follows from its own log-probability, its
gradient is made while the chunk's logits are there (`token_loss`); else the backward pass computes
them once more (`logp_entropy`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapo_jax.model import vocab
from sapo_jax.model.attention import einsum
from sapo_jax.parallel import collectives

CHUNK = 1024  # tokens whose logits exist at a time, at most
LOGITS = {"cpu": 40_000_000}  # entries of them, at most; elsewhere MANY_LOGITS
MANY_LOGITS = 160_000_000
PRODUCT = 8_000_000  # entries of a product that is added to the weight's gradient on CPU


def chunk_size(vocab: int, platform: str) -> int:
    """Tokens of a chunk: a power of 2, fewer for a large vocabulary, whose logits are large."""
    chunk = CHUNK
    while chunk > 128 and chunk * vocab > LOGITS.get(platform, MANY_LOGITS):
        chunk //= 2
    return chunk


class Tokens(NamedTuple):
    """The tokens whose log-probability is wanted, T of them.

    Attributes:
      targets: i32[T].
      source: i32[T], the row of ``hidden`` that predicts each; several may have the same.
      mask: bool[T]; the rest costs nothing and has results of 0.
    """

    targets: jax.Array
    source: jax.Array
    mask: jax.Array


class _Chunk(NamedTuple):
    """C of the tokens; ``index`` is T for what only fills the last chunk up."""

    index: jax.Array  # i32[C]
    source: jax.Array  # i32[C], out of range where index is
    hidden: jax.Array  # [C, D]
    logits: jax.Array  # f32[C, V], shifted by their maximum
    is_target: jax.Array  # bool[C, V]
    logp: jax.Array  # f32[C], of the targets
    total: jax.Array  # f32[C, 1], Σ exp(logits)
    entropy: jax.Array  # f32[C]


def _visit(
    body: Callable, start: Any, hidden_XD, weight_VD, tokens: Tokens, temperature, chunk: int
) -> Any:
    """``body(chunk, carry)`` of one chunk after another, as many as the mask needs."""
    t = tokens.mask.shape[0]
    order = jnp.nonzero(tokens.mask, size=t + (-t) % chunk, fill_value=t)[0].astype(jnp.int32)
    chunks = (jnp.sum(tokens.mask, dtype=jnp.int32) + chunk - 1) // chunk
    weight_VD = weight_VD.astype(hidden_XD.dtype)
    ids_V = vocab.offset(weight_VD.shape[0]) + jnp.arange(weight_VD.shape[0])

    def visit(i, carry):
        index_C = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        source_C = tokens.source.at[index_C].get(mode="fill", fill_value=hidden_XD.shape[0])
        h_CD = hidden_XD.at[source_C].get(mode="clip")
        y_C = tokens.targets.at[index_C].get(mode="clip")
        z_CV = einsum("cD,VD->cV", h_CD, weight_VD, out=jnp.float32)
        # XLA:CPU fuses the product with what follows, which is slow, but not across a select.
        z_CV = jnp.where((index_C < t)[:, None], z_CV / temperature, 0)
        z_CV = z_CV - vocab.max(z_CV)[:, None]
        e_CV = jnp.exp(z_CV)
        total_C = vocab.sum(e_CV)
        log_total_C = jnp.log(total_C)
        entropy_C = log_total_C - vocab.sum(e_CV * z_CV) / total_C
        logp_C = vocab.pick(z_CV, y_C) - log_total_C
        found = (h_CD, z_CV, y_C[:, None] == ids_V, logp_C, total_C[:, None], entropy_C)
        return body(_Chunk(index_C, source_C, *found), carry)

    with jax.named_scope("head_chunks"):
        return jax.lax.fori_loop(0, chunks, visit, start)


def _record(c: _Chunk, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logp_T, entropy_T = out
    return (
        logp_T.at[c.index].set(c.logp, mode="drop"),
        entropy_T.at[c.index].set(c.entropy, mode="drop"),
    )


def _backpropagate(c: _Chunk, d_logits_CV, weight_VD, temperature, grads):
    """Add what one chunk's logits give to the gradients of the hidden states and the weight."""
    d_hidden_XD, d_weight_VD = grads
    d_logits_CV = (d_logits_CV / temperature).astype(c.hidden.dtype)
    d_h_CD = einsum("cV,VD->cD", d_logits_CV, weight_VD.astype(c.hidden.dtype))
    d_hidden_XD = d_hidden_XD.at[c.source].add(d_h_CD.astype(d_hidden_XD.dtype), mode="drop")
    return d_hidden_XD, _add_product(d_weight_VD, d_logits_CV, c.hidden)


def _add_product(d_weight_VD, d_logits_CV, h_CD):
    """``d_weight_VD + d_logits_CVᵀ · h_CD``, by parts of V where XLA would make room for all."""
    vocab_size, d = d_weight_VD.shape
    parts = 1
    if collectives.platform() == "cpu":  # elsewhere a product adds to what is there
        while vocab_size * d > parts * PRODUCT and vocab_size % (2 * parts) == 0:
            parts *= 2
    size = vocab_size // parts

    def add(i, d_weight_VD):
        own_CV = jax.lax.dynamic_slice_in_dim(d_logits_CV, i * size, size, 1)
        own_VD = jax.lax.dynamic_slice_in_dim(d_weight_VD, i * size, size)
        own_VD += einsum("cV,cD->VD", own_CV, h_CD, out=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(d_weight_VD, own_VD, i * size, 0)

    return add(0, d_weight_VD) if parts == 1 else jax.lax.fori_loop(0, parts, add, d_weight_VD)


def _zero_grads(hidden_XD, weight_VD):
    return jnp.zeros(hidden_XD.shape, jnp.float32), jnp.zeros(weight_VD.shape, jnp.float32)


def _finished(grads, hidden_XD, weight_VD):
    # Each device of `tensor` has its own rows of the weight, but a part of every h's gradient.
    d_hidden_XD = collectives.psum(grads[0], vocab.TENSOR)
    return d_hidden_XD.astype(hidden_XD.dtype), grads[1].astype(weight_VD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def logp_entropy(
    hidden_XD: jax.Array, weight_VD: jax.Array, tokens: Tokens, temperature: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """log π(target) and the entropy of π = softmax(h·Wᵀ / temperature), at the tokens in the mask.

    Args:
      hidden_XD: final hidden states, in the compute dtype.
      weight_VD: the output matrix, or this device's part of it (see `vocab`).
      tokens: what to predict, from which hidden state.
      temperature: > 0; not differentiated.
      chunk: tokens whose logits exist at a time.

    Returns:
      (logp f32[T], entropy f32[T]) in nats; differentiable in hidden_XD and weight_VD.
    """
    zeros_T = jnp.zeros(tokens.mask.shape, jnp.float32)
    start = (zeros_T, zeros_T)
    return _visit(_record, start, hidden_XD, weight_VD, tokens, temperature, chunk)


def _logp_forward(hidden_XD, weight_VD, tokens, temperature, chunk):
    arguments = hidden_XD, weight_VD, tokens, temperature
    return logp_entropy(*arguments, chunk), arguments


def _logp_backward(chunk, saved, cotangents):
    hidden_XD, weight_VD, _, temperature = saved
    d_logp_T, d_entropy_T = cotangents

    def body(c, grads):
        a_C1, b_C1 = (
            d.at[c.index].get(mode="fill", fill_value=0)[:, None] for d in (d_logp_T, d_entropy_T)
        )
        p_CV = jnp.exp(c.logits) / c.total
        # With z the logits: ∂ log p_y/∂z = 1_y − p and ∂H/∂z = −p·(log p + H).
        logp_H_CV = c.logits - jnp.log(c.total) + c.entropy[:, None]
        d_logits_CV = a_C1 * (c.is_target - p_CV) - b_C1 * p_CV * logp_H_CV
        return _backpropagate(c, d_logits_CV, weight_VD, temperature, grads)

    grads = _visit(body, _zero_grads(hidden_XD, weight_VD), *saved, chunk)
    return *_finished(grads, hidden_XD, weight_VD), None, jnp.zeros_like(temperature)


logp_entropy.defvjp(_logp_forward, _logp_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def token_loss(
    loss: Callable[[jax.Array, Any], jax.Array],
    per_token: Any,
    hidden_XD: jax.Array,
    weight_VD: jax.Array,
    tokens: Tokens,
    temperature: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ_t loss(log π(target_t)), with its gradient made in the forward pass.

    Args:
      loss: (logp f32[C], what ``per_token`` holds of these tokens) → f32[C]; a token's loss depends
        on its own log-probability alone.
      per_token: a pair: a tree of [T, ...], and a tree that all tokens share.
      hidden_XD, weight_VD, tokens, temperature, chunk: as in `logp_entropy`.

    Returns:
      (the sum f32[], logp f32[T], entropy f32[T]); only the sum is differentiable.
    """
    logp_T, entropy_T = logp_entropy(hidden_XD, weight_VD, tokens, temperature, chunk)
    each_T = jnp.where(tokens.mask, loss(logp_T, per_token), 0)
    return jnp.sum(each_T), logp_T, entropy_T


def _loss_forward(loss, per_token, hidden_XD, weight_VD, tokens, temperature, chunk):
    own, shared = per_token

    def body(c, carry):
        total, out, grads = carry
        own_C = jax.tree.map(lambda x: x.at[c.index].get(mode="clip"), own)
        inside_C = c.index < tokens.mask.shape[0]

        def of(logp_C):
            return jnp.sum(jnp.where(inside_C, loss(logp_C, (own_C, shared)), 0))

        value, a_C = jax.value_and_grad(of)(c.logp)
        d_logits_CV = a_C[:, None] * (c.is_target - jnp.exp(c.logits) / c.total)
        grads = _backpropagate(c, d_logits_CV, weight_VD, temperature, grads)
        return total + value, _record(c, out), grads

    zeros_T = jnp.zeros(tokens.mask.shape, jnp.float32)
    start = jnp.float32(0), (zeros_T, zeros_T), _zero_grads(hidden_XD, weight_VD)
    total, out, grads = _visit(body, start, hidden_XD, weight_VD, tokens, temperature, chunk)
    return (total, *out), (_finished(grads, hidden_XD, weight_VD), jnp.zeros_like(temperature))


def _loss_backward(loss, chunk, saved, cotangents):
    grads, zero = saved
    d_hidden_XD, d_weight_VD = (cotangents[0].astype(g.dtype) * g for g in grads)
    return None, d_hidden_XD, d_weight_VD, None, zero


token_loss.defvjp(_loss_forward, _loss_backward)
