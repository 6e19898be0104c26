"""Sampler corrections: weights for tokens that another policy than π_old has drawn.

Three policies meet in an update: the sampler's, which drew the tokens; π_old, the learner's before
the iteration; and π_θ. Objectives know the last two. From ρ = π_old / π_sampler, at some level, a
correction makes the weight of each token's surrogate. It carries no gradient, and what it rejects
still counts in every denominator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.objectives.ratios import RATIOS, bounded, finite_logp
from sapo_jax.types import Weighted


@dataclasses.dataclass(frozen=True)
class Correction:
    """One correction.

    Attributes:
      ratio: the level of ρ: "token", "product" (of a sequence) or "sequence" (geometric mean).
      weight: (ρ, whether it is inside the bounds, bounds) → weight.
      bounds: defaults of ``low`` and ``high``, as values of ρ.
      source: where it comes from.
    """

    ratio: str
    weight: Callable
    bounds: Mapping[str, float]
    source: str


def _truncate(rho, inside, bounds):
    return jnp.where(inside, rho, bounds["high"])


def _reject(rho, inside, bounds):
    return jnp.where(inside, rho, 0)


def _keep(rho, inside, bounds):
    return inside.astype(rho.dtype)


_TIS = "truncated importance sampling, fengyao.notion.site/off-policy-rl (2025)"
_MIS = "masked importance sampling, as in TRL and verl (2025)"
CORRECTIONS: dict[str, Correction] = {
    "token_tis": Correction("token", _truncate, {"high": 2.0}, _TIS),
    "sequence_tis": Correction("product", _truncate, {"high": 2.0}, _TIS),
    "token_mis": Correction("token", _reject, {"high": 2.0}, _MIS),
    "sequence_mis": Correction("product", _reject, {"high": 3.0}, _MIS),
    "icepop": Correction(
        "token", _reject, {"low": 0.5, "high": 5.0}, "IcePop, arXiv 2510.18855, section 3"
    ),
    "geometric": Correction(
        "sequence", _keep, {"low": 0.999, "high": 1.001}, "geometric rejection, as in verl (2025)"
    ),
}


def bounds_of(name: str, **bounds: float | None) -> dict[str, float]:
    """The bounds of a correction: those given, else its defaults (None keeps the default).

    Raises:
      ValueError: an unknown name, a bound that it lacks, or bounds that hold nothing (traced ones
        are not looked at).
    """
    if name not in CORRECTIONS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(CORRECTIONS)}")
    defaults = CORRECTIONS[name].bounds
    given = {key: value for key, value in bounds.items() if value is not None}
    for key in given:
        if key not in defaults:
            raise ValueError(f"{name} has no bound {key!r}; it has {', '.join(defaults)}")
    merged = {**defaults, **given}
    low, high = merged.get("low", 0), merged["high"]
    traced = any(isinstance(value, jax.core.Tracer) for value in (low, high))
    if not traced and not 0 <= low < high:
        raise ValueError(f"{name}: low={low}, high={high} must be 0 ≤ low < high")
    return merged


def weights(
    name: str,
    old_logp_BT: jax.Array,
    sampler_logp_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    **bounds: jax.Array | float | None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The weights of one correction and what it cut.

    w = min(ρ, high) for truncation; ρ·1[low ≤ ρ ≤ high] for masking and IcePop;
    1[low ≤ ρ ≤ high] for geometric rejection; ρ = exp(log π_old − log π_sampler) of the token, of
    the sequence (product), or of the sequence's geometric mean.

    Args:
      name: one of CORRECTIONS, which name their sources.
      old_logp_BT: f[B, T], log π_old in nats, by the learner: not the sampler's own.
      sampler_logp_BT: f[B, T], log π of the sampler.
      mask_BT: bool[B, T].
      segments_BT: ids of packed sequences; one a row by default.
      **bounds: ``low`` and ``high``, values of ρ; may be traced.

    Returns:
      (f[B, T], ≥ 0 and 0 outside the mask, for `objectives.policy_loss`'s ``weights_BT``; metrics
      over the tokens of the batch: ``correction/rho_mean``, ``correction/weight_mean``,
      ``correction/cut``, the share truncated or rejected, and ``correction/ess``, the effective
      share of tokens (Σw)² / (n·Σw²)).

    Raises:
      ValueError: see `bounds_of`.
    """
    limits = bounds_of(name, **bounds)
    chex.assert_equal_shape([old_logp_BT, sampler_logp_BT, mask_BT])
    rule = CORRECTIONS[name]
    log_rho_BT = finite_logp(old_logp_BT, mask_BT) - finite_logp(sampler_logp_BT, mask_BT)
    rho_BT = jnp.exp(bounded(RATIOS[rule.ratio](log_rho_BT, mask_BT, segments_BT)))
    inside_BT = (rho_BT >= limits.get("low", 0)) & (rho_BT <= limits["high"])
    weights_BT = masked.keep(rule.weight(rho_BT, inside_BT, limits), mask_BT)
    count = jnp.sum(mask_BT, dtype=rho_BT.dtype)
    metrics = {
        "correction/rho_mean": masked.mean(rho_BT, mask_BT),
        "correction/weight_mean": masked.mean(weights_BT, mask_BT),
        "correction/cut": masked.mean(1 - inside_BT.astype(rho_BT.dtype), mask_BT),
        "correction/ess": Weighted(jnp.sum(weights_BT) ** 2, count * jnp.sum(weights_BT**2)),
    }
    reduced = {key: masked.ratio(value) for key, value in metrics.items()}
    return jax.lax.stop_gradient(weights_BT), reduced
