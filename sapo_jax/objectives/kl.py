"""Estimates of KL divergences from the log-probabilities of sampled tokens, in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.objectives.ratios import bounded, finite_logp

KL_ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: jnp.expm1(-d) + d,
}  # of KL(π_θ‖π_ref) from d = log π_θ − log π_ref
CORRECTED = {"k1_r": "k1", "k3_r": "k3"}  # times r: of tokens of π_old
KL_PENALTIES = (*KL_ESTIMATORS, *CORRECTED)  # in a loss


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, estimator: str) -> jax.Array:
    """Per-token estimate of KL(π_θ‖π_ref), from d = log π_θ − log π_ref within ±20.

    k1 = d, k2 = d²/2, k3 = e^{−d} − 1 + d (Schulman 2020, "Approximating KL divergence"). As a
    loss, on-policy, only k2 has the gradient of the reverse KL: k1's is noise around 0, k3's is
    that of the forward KL.

    Raises:
      ValueError: an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl={estimator!r}: must be one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](bounded(logp - jax.lax.stop_gradient(ref_logp)))


def kl_penalty(
    logp: jax.Array, old_logp: jax.Array, ref_logp: jax.Array, estimator: str
) -> jax.Array:
    """Per-token penalty on KL(π_θ‖π_ref) in a loss: `kl_estimate`, or r times it (k1_r, k3_r).

    Of tokens of π_old, the mean of r·k1 and of r·k3, r = π_θ/π_old of the token, is KL(π_θ‖π_ref),
    and with the gradient that r has, too, its gradient is that of the KL. Source: arXiv 2512.02556
    (DeepSeek-V3.2, k3), and TRL's ``use_bias_correction_kl``.
    """
    found = kl_estimate(logp, ref_logp, CORRECTED.get(estimator, estimator))
    return jnp.exp(bounded(logp - old_logp)) * found if estimator in CORRECTED else found


def kl_to_old(log_ratio: jax.Array) -> jax.Array:
    """Per-token estimate of KL(π_old‖π_θ) from tokens of π_old: r − 1 − log r ≥ 0."""
    return jnp.expm1(log_ratio) - log_ratio


def sequence_kl(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, mask_BT: jax.Array, estimator: str
) -> jax.Array:
    """Σ_t `kl_estimate` of each row, f[B]: what a KL penalty in the reward subtracts.

    With k1, R − β Σ_t (log π − log π_ref) has the gradient of the reverse KL by REINFORCE.
    """
    logp_BT, ref_logp_BT = finite_logp(logp_BT, mask_BT), finite_logp(ref_logp_BT, mask_BT)
    return jnp.sum(masked.keep(kl_estimate(logp_BT, ref_logp_BT, estimator), mask_BT), -1)
