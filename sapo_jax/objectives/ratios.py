"""Ratio levels: from per-token log-ratios to the log-ratio that a gate sees at each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax import masked

LOG_RATIO_BOUND = 20.0  # e^20 ≈ 5e8: beyond it no gate has a gradient that matters in f32
LOGP_BOUND = 1e4  # keeps log-probabilities of ±∞ finite through a sequence's sum


def bounded(x: jax.Array, bound: float = LOG_RATIO_BOUND) -> jax.Array:
    """Clip to ±bound with gradient 1 up to the bound and 0 beyond (`jnp.clip` has ½ on it)."""
    return jnp.where(x > bound, bound, jnp.where(x < -bound, -bound, x))


def finite_logp(logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Log-probabilities within ±LOGP_BOUND, 0 outside the mask.

    Masking comes first of all: masked after the exponential, padding has the gradient 0·∞ = NaN.
    """
    return masked.keep(bounded(logp_BT, LOGP_BOUND), mask_BT)


def _sequence_token(log_ratio_BT, mask_BT, segments_BT):
    sg = jax.lax.stop_gradient
    mean_BT = masked.sequence_mean(log_ratio_BT, mask_BT, segments_BT)
    return sg(mean_BT) + log_ratio_BT - sg(log_ratio_BT)


def _token(log_ratio_BT, mask_BT, segments_BT):
    return log_ratio_BT


RATIOS = {
    "token": _token,
    "prefix": _token,  # of a gate that looks at the tokens before each
    "sequence": masked.sequence_mean,  # of log-ratios: log of the geometric mean
    "sequence_token": _sequence_token,  # its value, with the gradient of each token's own log π
    "product": masked.sequence_sum,
    "geo_clipped": masked.sequence_mean,  # of what `clip_tokens` leaves of each
}  # each takes (log_ratio_BT, mask_BT, segments_BT)


def clip_tokens(
    log_ratio_BT: jax.Array, advantages_BT: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """GMPO's clip: ℓ ≤ ε_high where A > 0, ℓ ≥ −ε_low elsewhere (arXiv 2507.20673, Eq. 4)."""
    gain_BT = jnp.where(log_ratio_BT <= high, log_ratio_BT, high)
    loss_BT = jnp.where(log_ratio_BT >= -low, log_ratio_BT, -low)
    return jnp.where(advantages_BT > 0, gain_BT, loss_BT)
