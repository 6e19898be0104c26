"""Gates: what an algorithm does to the importance ratio of one token.

With ℓ = log π_θ − log π_old (reduced to the objective's ratio level) and r = e^ℓ, a gate returns
the per-token surrogate that is *maximised*, f(r)·A or sg(c)·A·log π_θ. Its gate weight w = f′(r)
and its coefficient c = r·w on ∇log π_θ follow by differentiation; nothing here restates them.
Hard bounds are `where`s, since the derivative of `clip` is ½ on its bounds. A < 0 takes the
"negative" branch and so does A = 0, where it makes no difference.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sapo_jax import masked

sg = jax.lax.stop_gradient


class TokenInputs(NamedTuple):
    """What a gate sees of each token; all f[B, T], finite, and 0 outside the mask."""

    logp: jax.Array  # log π_θ, nats
    old_logp: jax.Array  # log π_old, nats
    log_ratio: jax.Array  # log r at the objective's ratio level, within ±20
    advantages: jax.Array


def logistic(z: jax.Array) -> jax.Array:
    """σ(z), its derivative exact in the tails (that of `jax.nn.sigmoid` is 0 from z ≈ 17)."""
    positive = z >= 0
    tail = jnp.exp(jnp.where(positive, -z, z))
    tail = tail / (1 + tail)
    return jnp.where(positive, 1 - tail, tail)


def _signed(advantages: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    return jnp.where(advantages > 0, positive, negative)


def sapo(inputs: TokenInputs, mask: jax.Array, hp: dict) -> jax.Array:
    """SAPO: f(r) = (4/τ)·σ(τ(r − 1)), τ = τ_pos where A > 0, else τ_neg; w = sech²(τ(r − 1)/2).

    Source: arXiv 2511.20347, Eq. 5-6.
    """
    del mask
    tau = _signed(inputs.advantages, hp["tau_pos"], hp["tau_neg"])
    r = jnp.exp(inputs.log_ratio)
    return 4 / tau * logistic(tau * (r - 1)) * inputs.advantages


def clip(inputs: TokenInputs, mask: jax.Array, hp: dict) -> jax.Array:
    """PPO's clip: min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A), with r ≤ dual_clip where A < 0.

    Source: arXiv 1707.06347, Eq. 7; dual clip: arXiv 1912.09729, Eq. 5 (∞ switches it off).
    """
    del mask
    r = jnp.exp(inputs.log_ratio)
    upper, lower, dual = 1 + hp["eps_high"], 1 - hp["eps_low"], hp["dual_clip"]
    gain = jnp.where(r <= upper, r, upper)
    loss = jnp.where(r < lower, lower, jnp.where(r <= dual, r, dual))
    return _signed(inputs.advantages, gain, loss) * inputs.advantages


def reinforce(inputs: TokenInputs, mask: jax.Array, hp: dict) -> jax.Array:
    """REINFORCE: A·log π_θ, no ratio and no gate; c = 1.

    Source: Williams 1992.
    """
    del mask, hp
    return inputs.advantages * inputs.logp


def cispo(inputs: TokenInputs, mask: jax.Array, hp: dict) -> jax.Array:
    """CISPO: sg(clip(r, 1 − ε_low, 1 + ε_high))·A·log π_θ; c never vanishes.

    Source: arXiv 2506.13585, Eq. 4-5. ε are distances from 1, as in the paper; TRL, ms-swift and
    Liger read theirs as an absolute cap.
    """
    del mask
    r = jnp.exp(inputs.log_ratio)
    weight = jnp.clip(r, 1 - hp["eps_low"], 1 + hp["eps_high"])
    return sg(weight) * inputs.advantages * inputs.logp


def p3o(inputs: TokenInputs, mask: jax.Array, hp: dict) -> jax.Array:
    """P3O (Scopic): f(r) = (4/τ)·σ(τ(r − 1)), one τ for both signs; its KL is added beside it.

    Source: arXiv 2205.10047, Eq. 7.
    """
    del mask
    r = jnp.exp(inputs.log_ratio)
    return 4 / hp["tau"] * logistic(hp["tau"] * (r - 1)) * inputs.advantages


def old_kl(inputs: TokenInputs, mask: jax.Array) -> jax.Array:
    """An estimate of KL(π_old‖π_θ) from tokens of π_old: r − 1 − log r ≥ 0, per token, in nats."""
    return masked.keep(jnp.expm1(inputs.log_ratio) - inputs.log_ratio, mask)
