"""Gates: what an algorithm does to the importance ratio of one token.

With ℓ = log π_θ − log π_old (reduced to the objective's ratio level) and r = e^ℓ, a gate takes
(`TokenInputs`, hyperparameters) and returns the per-token surrogate that is *maximised*, f(r)·A or
sg(c)·A·log π_θ. Its gate weight w = f′(r) and its coefficient c = r·w on ∇log π_θ follow by
differentiation; nothing here restates them. Hard bounds are `where`s, since the derivative of
`clip` is ½ on its bounds. A < 0 takes the "negative" branch and so does A = 0, where it makes no
difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

sg = jax.lax.stop_gradient


class TokenInputs(NamedTuple):
    """What a gate sees of each token; all f[B, T], finite, and 0 outside the mask."""

    logp: jax.Array  # log π_θ, nats
    old_logp: jax.Array  # log π_old, nats
    log_ratio: jax.Array  # log r at the objective's ratio level, within ±20
    advantages: jax.Array
    mask: jax.Array | None = None  # bool[B, T]
    segments: jax.Array | None = None  # i32[B, T], None where a row is a sequence
    moves: jax.Array | None = None  # bool[B, T], whether log r moves with the token's own log π

    @property
    def ratio(self) -> jax.Array:
        """The importance ratio r."""
        return jnp.exp(self.log_ratio)

    def by_sign(self, positive: jax.Array, negative: jax.Array) -> jax.Array:
        """One value where A > 0, another elsewhere."""
        return jnp.where(self.advantages > 0, positive, negative)


def logistic(z: jax.Array) -> jax.Array:
    """σ(z), its derivative exact in the tails (that of `jax.nn.sigmoid` is 0 from z ≈ 17)."""
    positive = z >= 0
    tail = jnp.exp(jnp.where(positive, -z, z))
    tail = tail / (1 + tail)
    return jnp.where(positive, 1 - tail, tail)


def sapo(x: TokenInputs, hp: dict) -> jax.Array:
    """SAPO: f(r) = (4/τ)·σ(τ(r − 1)), τ = τ_pos where A > 0, else τ_neg; w = sech²(τ(r − 1)/2).

    Source: arXiv 2511.20347, Eq. 5-6.
    """
    tau = x.by_sign(hp["tau_pos"], hp["tau_neg"])
    return 4 / tau * logistic(tau * (x.ratio - 1)) * x.advantages


def sapo_quadrant(x: TokenInputs, hp: dict) -> jax.Array:
    """SAPO with four temperatures: f(r) = (4/τ)·(σ(τ(r − 1)) − ½) + 2/τ_above, τ = τ_below where
    r < 1, else τ_above, each by the sign of A; w = sech²(τ(r − 1)/2). The constants join the sides
    at r = 1. With τ_below = τ_above it is SAPO.

    Source: this project; the gate is that of arXiv 2511.20347, Eq. 6.
    """
    above = x.by_sign(hp["tau_pos_above"], hp["tau_neg_above"])
    below = x.by_sign(hp["tau_pos_below"], hp["tau_neg_below"])
    tau = jnp.where(x.log_ratio < 0, below, above)
    return (4 / tau * (logistic(tau * (x.ratio - 1)) - 0.5) + 2 / above) * x.advantages


def _soft(x: TokenInputs, hp: dict, antiderivative: Callable, half_width: float) -> jax.Array:
    """f(r) = F(κ(r − 1))/κ with F′(0) = 1, for w = F′ that falls to ½ at ``half_width``.

    κ = τ · half_width / 1.7627 gives w the half-width of SAPO's sech²(τ(r − 1)/2).
    """
    factor = half_width / (2 * math.acosh(math.sqrt(2)))
    kappa = factor * x.by_sign(hp["tau_pos"], hp["tau_neg"])
    u = kappa * (x.ratio - 1)
    return antiderivative(u) / kappa * x.advantages


def sapo_erf(x: TokenInputs, hp: dict) -> jax.Array:
    """f(r) = (√π/2κ)·erf(κ(r − 1)); w = e^{−u²} with u = κ(r − 1), κ = τ times a factor that gives
    it the half-width of SAPO's gate.

    Source: arXiv 2602.19345 (version 2).
    """
    half = math.sqrt(math.pi) / 2
    return _soft(x, hp, lambda u: half * jax.scipy.special.erf(u), math.log(2) ** 0.5)


def sapo_arctan(x: TokenInputs, hp: dict) -> jax.Array:
    """f(r) = arctan(κ(r − 1))/κ; w = 1/(1 + u²) with u = κ(r − 1), κ = τ times a factor that gives
    it the half-width of SAPO's gate.

    Source: arXiv 2602.19345 (version 2).
    """
    return _soft(x, hp, jnp.arctan, 1.0)


def sapo_softsign(x: TokenInputs, hp: dict) -> jax.Array:
    """f(r) = (1/κ)·u/√(1 + u²); w = (1 + u²)^{−3/2} with u = κ(r − 1), κ = τ times a factor that
    gives it the half-width of SAPO's gate.

    Source: arXiv 2602.19345 (version 2).
    """
    return _soft(x, hp, lambda u: u / jnp.sqrt(1 + u * u), (2 ** (2 / 3) - 1) ** 0.5)


def sapo_softsign_abs(x: TokenInputs, hp: dict) -> jax.Array:
    """f(r) = (1/κ)·u/(1 + |u|); w = 1/(1 + |u|)² with u = κ(r − 1), κ = τ times a factor that gives
    it the half-width of SAPO's gate.

    Source: this project; the usual softsign, which that of arXiv 2602.19345 is not.
    """
    return _soft(x, hp, lambda u: u / (1 + jnp.where(u < 0, -u, u)), math.sqrt(2) - 1)


def clip(x: TokenInputs, hp: dict) -> jax.Array:
    """PPO's clip: min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A), with r ≤ dual_clip where A < 0.

    Source: arXiv 1707.06347, Eq. 7; dual clip: arXiv 1912.09729, Eq. 5 (∞ switches it off).
    """
    r = x.ratio
    upper, lower, dual = 1 + hp["eps_high"], 1 - hp["eps_low"], hp["dual_clip"]
    gain = jnp.where(r <= upper, r, upper)
    loss = jnp.where(r < lower, lower, jnp.where(r <= dual, r, dual))
    return x.by_sign(gain, loss) * x.advantages


def reinforce(x: TokenInputs, hp: dict) -> jax.Array:
    """REINFORCE: A·log π_θ, no ratio and no gate; c = 1.

    Source: Williams 1992.
    """
    return x.advantages * x.logp


def cispo(x: TokenInputs, hp: dict) -> jax.Array:
    """CISPO: sg(clip(r, 1 − ε_low, 1 + ε_high))·A·log π_θ; c never vanishes.

    Source: arXiv 2506.13585, Eq. 4-5. ε are distances from 1, as in the paper; TRL, ms-swift and
    Liger read theirs as an absolute cap.
    """
    weight = jnp.clip(x.ratio, 1 - hp["eps_low"], 1 + hp["eps_high"])
    return sg(weight) * x.advantages * x.logp


def p3o(x: TokenInputs, hp: dict) -> jax.Array:
    """P3O (Scopic): f(r) = (4/τ)·σ(τ(r − 1)), one τ for both signs; its KL is added beside it.

    Source: arXiv 2205.10047, Eq. 7.
    """
    return 4 / hp["tau"] * logistic(hp["tau"] * (x.ratio - 1)) * x.advantages


def importance(x: TokenInputs, hp: dict) -> jax.Array:
    """r·A: the bare importance ratio; GMPO's, whose clip is part of its ratio level.

    Source: arXiv 2507.20673, Eq. 4.
    """
    return x.ratio * x.advantages


def maspo(x: TokenInputs, hp: dict) -> jax.Array:
    """MASPO: sg(w)·r·A with w = exp(−(r − 1)²/2s²) where the update pushes r away from 1, else 1.

    s = (σ/π_old^α)·(1 + βA) where A > 0, (σ/π_old^α)/(1 − βA) else; the factors are held to
    [σ, 10] and [0.1, 10], as in the authors' code. Source: arXiv 2602.17550.
    """
    a, r = x.advantages, x.ratio
    by_probability = jnp.clip(hp["sigma"] * jnp.exp(-hp["alpha"] * x.old_logp), hp["sigma"], 10)
    by_advantage = x.by_sign(1 + hp["beta"] * a, 1 / (1 - hp["beta"] * a))
    width = by_probability * jnp.clip(by_advantage, 0.1, 10)
    outward = jnp.where(a > 0, r > 1, (a < 0) & (r < 1))
    weight = jnp.where(outward, jnp.exp(-((r - 1) ** 2) / (2 * width**2)), 1)
    return sg(weight) * r * a


def mhpo(x: TokenInputs, hp: dict) -> jax.Array:
    """MHPO: scale·exp(ψ − sg ζ)·A, ψ = b·tanh(ℓ/b), ζ = (σ₊(ψ)/λ₊)^k₊ + (σ₊(−ψ)/λ₋)^k₋.

    σ₊ is softplus. With scale 1 the coefficient at r = 1 is 0.26506: a smaller learning rate in
    disguise, which `mhpo_unit` takes out. Source: arXiv 2603.16929.
    """
    psi = hp["bound"] * jnp.tanh(x.log_ratio / hp["bound"])
    up = (jax.nn.softplus(psi) / hp["lambda_pos"]) ** hp["k_pos"]
    down = (jax.nn.softplus(-psi) / hp["lambda_neg"]) ** hp["k_neg"]
    return hp["scale"] * jnp.exp(psi - sg(up + down)) * x.advantages


def vespo(x: TokenInputs, hp: dict) -> jax.Array:
    """VESPO: sg(φ(W))·A·log π_θ, φ = e^λ W^k e^{−λW} of the sequence's product ratio W.

    (k, λ) by the sign of A; values are those of the authors' code, not of its docstring.
    Source: arXiv 2602.10693.
    """
    k = x.by_sign(hp["k_pos"], hp["k_neg"])
    rate = x.by_sign(hp["lambda_pos"], hp["lambda_neg"])
    weight = jnp.exp(rate + k * x.log_ratio - rate * x.ratio)
    return sg(weight) * x.advantages * x.logp


def topr(x: TokenInputs, hp: dict) -> jax.Array:
    """TOPR: sg(clip(W, low, high))·A·log π_θ of the sequence's product ratio W; low and high by the
    sign of A: 1 and 1 where A > 0, where W plays no part, 0 and 1 elsewhere.

    Source: arXiv 2503.14286, Eq. 7-8, as excerpts of version 2 give them.
    """
    low = x.by_sign(hp["low_pos"], hp["low_neg"])
    high = x.by_sign(hp["high_pos"], hp["high_neg"])
    return sg(jnp.clip(x.ratio, low, high)) * x.advantages * x.logp
