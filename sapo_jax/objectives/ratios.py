"""Ratio levels: from per-token log-ratios to the log-ratio that a gate sees; KL estimates.

A level takes (log_ratio_BT, mask_BT, segments_BT, advantages_BT, hyperparameters), all masked, and
returns the reduced log-ratio at each token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax import masked

sg = jax.lax.stop_gradient

LOG_RATIO_BOUND = 20.0  # e^20 ≈ 5e8: beyond it no gate has a gradient that matters in f32
KL_ESTIMATES = ("k1", "k2", "k3")
LOGP_BOUND = 1e4  # keeps log-probabilities of ±∞ finite through a sequence's sum


def bounded(x: jax.Array, bound: float) -> jax.Array:
    """Clip to ±bound with gradient 1 up to the bound and 0 beyond (`jnp.clip` has ½ on it)."""
    return jnp.where(x > bound, bound, jnp.where(x < -bound, -bound, x))


def _token(log_ratio_BT, mask_BT, segments_BT, advantages_BT, hp):
    return log_ratio_BT


def _sequence(log_ratio_BT, mask_BT, segments_BT, advantages_BT, hp):
    return masked.sequence_mean(log_ratio_BT, mask_BT, segments_BT)


def _sequence_token(log_ratio_BT, mask_BT, segments_BT, advantages_BT, hp):
    mean_BT = masked.sequence_mean(log_ratio_BT, mask_BT, segments_BT)
    return sg(mean_BT) + log_ratio_BT - sg(log_ratio_BT)


def _product(log_ratio_BT, mask_BT, segments_BT, advantages_BT, hp):
    return masked.sequence_sum(log_ratio_BT, mask_BT, segments_BT)


def _geo_clipped(log_ratio_BT, mask_BT, segments_BT, advantages_BT, hp):
    high, low = hp["eps_high"], -hp["eps_low"]
    gain_BT = jnp.where(log_ratio_BT <= high, log_ratio_BT, high)
    loss_BT = jnp.where(log_ratio_BT >= low, log_ratio_BT, low)
    clipped_BT = jnp.where(advantages_BT > 0, gain_BT, loss_BT)
    return masked.sequence_mean(clipped_BT, mask_BT, segments_BT)


RATIOS = {
    "token": _token,
    "sequence": _sequence,
    "sequence_token": _sequence_token,
    "product": _product,
    "geo_clipped": _geo_clipped,
}


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str) -> jax.Array:
    """Per-token estimate of KL(π_θ‖π_ref) in nats, from d = log π_θ − log π_ref within ±20.

    k1 = d, k2 = d²/2, k3 = e^{−d} − 1 + d (Schulman 2020, "Approximating KL divergence"). As a
    loss, on-policy, only k2 has the gradient of the reverse KL: k1's is noise around 0, k3's is
    that of the forward KL.
    """
    d = bounded(logp - sg(ref_logp), LOG_RATIO_BOUND)
    estimates = {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: jnp.expm1(-d) + d}
    if kind not in KL_ESTIMATES:
        raise ValueError(f"kl={kind!r}: must be one of {', '.join(KL_ESTIMATES)}")
    return estimates[kind]()


def sequence_kl(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, mask_BT: jax.Array, kind: str
) -> jax.Array:
    """Σ_t `kl_estimate` of each row, f[B] in nats: what a KL penalty in the reward subtracts.

    With k1, R − β Σ_t (log π − log π_ref) has the gradient of the reverse KL by REINFORCE.
    """
    logp_BT, ref_logp_BT = (
        masked.keep(bounded(x, LOGP_BOUND), mask_BT) for x in (logp_BT, ref_logp_BT)
    )
    return jnp.sum(masked.keep(kl_estimate(logp_BT, ref_logp_BT, kind), mask_BT), -1)
