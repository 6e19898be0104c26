"""Gates that keep a token by how far its probability has moved, not by its ratio.

A token counts in full, r·A, where its update moves r towards 1, or where its divergence D from
π_old is within a bound; else not at all. D looks at the sampled token against all others, which
needs no more than its log-probabilities ("binary" in arXiv 2602.04879).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.objectives.gates import TokenInputs, sg

TINY = 1e-8  # as in the authors' code: a token of probability 1 has no others


def _probabilities(x: TokenInputs) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """log π_θ, log π_old, and both as 1 − π, which `expm1` keeps exact near 1; no gradients."""
    logp, old_logp = (jnp.minimum(sg(y), 0) for y in (x.logp, x.old_logp))
    return logp, old_logp, -jnp.expm1(logp), -jnp.expm1(old_logp)


def total_variation(x: TokenInputs) -> jax.Array:
    """|π_θ − π_old| of the sampled token."""
    *_, rest, old_rest = _probabilities(x)
    return jnp.abs(rest - old_rest)


def kl(x: TokenInputs) -> jax.Array:
    """KL(π_old‖π_θ) between the sampled token and all others."""
    logp, old_logp, rest, old_rest = _probabilities(x)
    others = old_rest * jnp.log((old_rest + TINY) / (rest + TINY))
    return (1 - old_rest) * (old_logp - logp) + others


def _ratio_within(x: TokenInputs, within: jax.Array) -> jax.Array:
    """r·A where the update moves r towards 1, or D is within its bound."""
    inward = x.advantages * sg(x.log_ratio) <= 0
    return jnp.where(inward | within, x.ratio, 0) * x.advantages


def _bound(x: TokenInputs, hp: dict) -> jax.Array:
    return jnp.where(sg(x.log_ratio) > 0, hp["delta_high"], hp["delta_low"])


def dppo_tv(x: TokenInputs, hp: dict) -> jax.Array:
    """DPPO with total variation: M·r·A, M = 1 where A(r − 1) ≤ 0 or D ≤ δ, else 0; D = |π_θ −
    π_old| of the sampled token; δ_high where r > 1, δ_low elsewhere.

    Source: arXiv 2602.04879, and its authors' code (sail-sg/Stable-RL).
    """
    return _ratio_within(x, total_variation(x) <= _bound(x, hp))


def dppo_kl(x: TokenInputs, hp: dict) -> jax.Array:
    """DPPO with KL: as `dppo_tv`, D = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q)), p = π_old, q = π_θ
    of the sampled token.

    Source: arXiv 2602.04879, and its authors' code (sail-sg/Stable-RL).
    """
    return _ratio_within(x, kl(x) <= _bound(x, hp))


def cppo(x: TokenInputs, hp: dict) -> jax.Array:
    """CPPO: M·r·A, M = 1 where A(r − 1) ≤ 0 or w_t·D_t ≤ min(δ, δ + δ_b·W_{t−1} − S_{t−1}), else 0;
    D = |π_θ − π_old| of the sampled token, W and S the sums of w and w·D over the tokens before it,
    and w_t falls from 1 at the first token to w_min at the last.

    Source: arXiv 2606.10968, Eq. 8-11 (binary divergence; δ_b is a constant).
    """
    ones = jnp.ones_like(x.logp)
    length = masked.sequence_sum(ones, x.mask, x.segments)
    place = masked.sequence_cumsum(ones, x.mask, x.segments) - 1
    weight = 1 - (1 - hp["w_min"]) * place / jnp.maximum(length - 1, 1)
    moved = weight * total_variation(x)
    before, budget = (masked.sequence_cumsum(y, x.mask, x.segments) - y for y in (moved, weight))
    slack = jnp.minimum(0, hp["delta_prefix"] * budget - before)
    return _ratio_within(x, moved <= hp["delta"] + slack)
