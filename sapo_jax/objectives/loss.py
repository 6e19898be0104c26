"""Objectives as data: a gate, a ratio level, an aggregation and traced hyperparameters.

Every method here maximises an aggregate of surrogates whose gradient is Σ c·A·∇log π_θ;
`policy_loss` returns its negative. Steps, in this order: mask log-probabilities → log-ratio →
reduce to the ratio level → clip the reduced log-ratio to ±20 → exponentiate → gate → aggregate.
Masking after the exponential would give NaN gradients at padding (0·∞).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import masked
from sapo_jax.objectives import gates
from sapo_jax.objectives.aggregations import aggregate, finish
from sapo_jax.objectives.presets import DOMAINS, OBJECTIVES, Objective, switch
from sapo_jax.objectives.ratios import LOG_RATIO_BOUND, LOGP_BOUND, RATIOS, bounded, kl_estimate
from sapo_jax.types import Max, Min

__all__ = [
    "OBJECTIVES", "Objective", "coefficients", "finish", "policy_loss", "policy_terms", "resolve",
    "switch", "token_inputs",
]  # fmt: skip
sg = jax.lax.stop_gradient


def resolve(objective: str | Objective, **hyperparameters) -> Objective:
    """A preset or an objective with some hyperparameters overridden (None keeps the preset's).

    Raises:
      ValueError: an unknown name, a hyperparameter that the objective lacks or that is required
        and missing, a value out of its domain (traced values are not looked at).
    """
    name = objective if isinstance(objective, str) else "objective"
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            near = difflib.get_close_matches(objective, OBJECTIVES, 1, 0)
            raise ValueError(
                f"objective={objective!r}: must be one of {', '.join(OBJECTIVES)}; "
                f"the nearest is {near[0]!r}"
            )
        objective = OBJECTIVES[objective]
    allowed = objective.hyperparameters
    merged = dict(allowed)
    for key in sorted(hyperparameters, key=lambda k: k.count(".")):  # a member's own come last
        value = hyperparameters[key]
        meant = [k for k in allowed if k == key or k.endswith(f".{key}")]
        if not meant:
            raise ValueError(f"{name} has no hyperparameter {key!r}; it has {', '.join(allowed)}")
        merged |= dict.fromkeys(meant, value) if value is not None else {}
    for key, value in merged.items():
        check, text = _domain(objective, key)
        if value is None:
            raise ValueError(f"{name} needs the hyperparameter {key!r}: {text}")
        if not isinstance(value, jax.core.Tracer) and not np.all(check(np.asarray(value))):
            raise ValueError(f"{name}: {key}={value} must be {text}")
    return dataclasses.replace(objective, hyperparameters=merged)


def _domain(objective: Objective, key: str) -> tuple[Callable, str]:
    """A test of a hyperparameter's value, and what it asks for in words."""
    if key == "index":
        last = len(objective.members) - 1
        return lambda v: (v == np.int32(v)) & (v >= 0) & (v <= last), f"an integer in 0..{last}"
    return DOMAINS.get(key.split(".")[-1], (lambda v: v == v, "a number"))


def _of_the_chosen(function: Callable) -> Callable:
    """A function of an objective, applied to the member that a switch's index chooses."""

    @functools.wraps(function)
    def call(objective: Objective, *arguments, **more):
        if not objective.members:
            return function(objective, *arguments, **more)
        members = [objective.member(i) for i in range(len(objective.members))]
        branches = [functools.partial(function, m, *arguments, **more) for m in members]
        index = jnp.asarray(objective.hyperparameters["index"], jnp.int32)
        return jax.lax.switch(index, branches)

    return call


@_of_the_chosen
def coefficients(
    objective: Objective, inputs: gates.TokenInputs, mask_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The coefficient c on A·∇log π_θ of each token, by differentiating the surrogate.

    Returns:
      (c f[B, T], counted bool[B, T]): c is known where A ≠ 0 under the mask; 0 elsewhere.
    """
    inputs = jax.tree.map(sg, inputs)

    def total(shift_BT):
        shifted = inputs._replace(
            logp=inputs.logp + shift_BT, log_ratio=inputs.log_ratio + shift_BT
        )
        surrogate_BT = objective.gate(shifted, mask_BT, objective.hyperparameters)
        return jnp.sum(masked.keep(surrogate_BT, mask_BT))

    gradient_BT = jax.grad(total)(jnp.zeros_like(inputs.logp))
    counted_BT = mask_BT & (inputs.advantages != 0)
    safe_BT = jnp.where(counted_BT, inputs.advantages, 1)
    return masked.keep(gradient_BT / safe_BT, counted_BT), counted_BT


@_of_the_chosen
def token_inputs(
    objective: Objective,
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    segments_BT: jax.Array | None = None,
) -> tuple[gates.TokenInputs, jax.Array]:
    """What the gate sees, and where the reduced log-ratio was clipped (bool[B, T]).

    Raises:
      ValueError, AssertionError: wrong dtypes or shapes.
    """
    dtype = logp_BT.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"logp has dtype {dtype}: objectives take float32 or float64")
    chex.assert_type([old_logp_BT, advantages_B], dtype)
    chex.assert_rank([logp_BT, mask_BT], 2)
    chex.assert_equal_shape([logp_BT, old_logp_BT, mask_BT])
    chex.assert_rank(advantages_B, {1, 2})
    advantages_BT = advantages_B if advantages_B.ndim == 2 else advantages_B[:, None]
    advantages_BT = masked.keep(jnp.broadcast_to(advantages_BT, logp_BT.shape), mask_BT)
    logp_BT = masked.keep(bounded(logp_BT, LOGP_BOUND), mask_BT)
    old_logp_BT = sg(masked.keep(bounded(old_logp_BT, LOGP_BOUND), mask_BT))
    reduced_BT = RATIOS[objective.ratio](
        logp_BT - old_logp_BT, mask_BT, segments_BT, advantages_BT, objective.hyperparameters
    )
    clipped_BT = mask_BT & (jnp.abs(reduced_BT) > LOG_RATIO_BOUND)
    log_ratio_BT = masked.keep(bounded(reduced_BT, LOG_RATIO_BOUND), mask_BT)
    return gates.TokenInputs(logp_BT, old_logp_BT, log_ratio_BT, advantages_BT), clipped_BT


@_of_the_chosen
def policy_terms(
    objective: Objective,
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    *,
    ref_logp_BT: jax.Array | None = None,
    kl: str = "k3",
    weights_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> dict[str, Any]:
    """The loss ("loss") and its metrics as reductions that merge over micro-batches and shards.

    Arguments as for `policy_loss`, with an objective from `resolve`.
    """
    mask_BT = mask_BT.astype(bool)
    hp = {k: jnp.asarray(v, logp_BT.dtype) for k, v in objective.hyperparameters.items()}
    objective = dataclasses.replace(objective, hyperparameters=hp)
    inputs, clipped_BT = token_inputs(
        objective, logp_BT, old_logp_BT, advantages_B, mask_BT, segments_BT
    )
    loss_BT = -objective.gate(inputs, mask_BT, hp)
    if weights_BT is not None:
        loss_BT = loss_BT * sg(masked.keep(weights_BT, mask_BT))
    terms = {}
    if objective.kl_against == "old":
        loss_BT = loss_BT + hp["kl_coef"] * gates.old_kl(inputs, mask_BT)
    if ref_logp_BT is not None:
        ref_logp_BT = masked.keep(bounded(ref_logp_BT, LOGP_BOUND), mask_BT)
        kl_BT = kl_estimate(inputs.logp, ref_logp_BT, kl)
        if objective.kl_against == "ref":
            loss_BT = loss_BT + hp["kl_coef"] * kl_BT
        terms["policy/kl_ref"] = masked.mean(sg(kl_BT), mask_BT)
    terms["loss"] = aggregate(
        loss_BT,
        mask_BT,
        objective.aggregation,
        segments_BT=segments_BT,
        max_length=hp.get("max_length"),
    )
    return terms | _gate_metrics(objective, inputs, clipped_BT, mask_BT)


def _gate_metrics(objective, inputs, clipped_BT, mask_BT) -> dict[str, Any]:
    c_BT, counted_BT = coefficients(objective, inputs, mask_BT)
    c_BT = jnp.where(clipped_BT, 0, c_BT)
    r_BT = jnp.exp(sg(inputs.log_ratio))
    one = jnp.ones((), r_BT.dtype)
    return {
        "policy/ratio_max": Max(jnp.max(jnp.where(mask_BT, r_BT, -jnp.inf))),
        "policy/ratio_min": Min(jnp.min(jnp.where(mask_BT, r_BT, jnp.inf))),
        "policy/gate_mean": masked.mean(c_BT / r_BT, counted_BT),
        "policy/clipped": masked.mean((c_BT == 0) * one, counted_BT),
        "policy/log_ratio_clipped": masked.mean(clipped_BT * one, mask_BT),
        "policy/kl_old": masked.mean(sg(gates.old_kl(inputs, mask_BT)), mask_BT),
    }


def policy_loss(
    objective: str | Objective,
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    *,
    ref_logp_BT: jax.Array | None = None,
    kl: str = "k3",
    weights_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    **hyperparameters,
) -> tuple[jax.Array, dict[str, Any]]:
    """The scalar loss of one batch: −aggregate(surrogate) + kl_coef · aggregate(KL).

    Source: SAPO, arXiv 2511.20347, Eq. 5; the other objectives name theirs in `gates`.

    Args:
      objective: a name in OBJECTIVES, or an Objective.
      logp_BT: f32 or f64 [B, T], log π_θ of the tokens in nats; the loss is differentiable in it.
      old_logp_BT: of the same shape and dtype, log π_old.
      advantages_B: [B] or [B, T], same dtype.
      mask_BT: bool[B, T], the tokens that exist; a row with none counts in no denominator.
      ref_logp_BT: log π_ref for the KL penalty.
      kl: its estimator, k1, k2 or k3.
      weights_BT: importance corrections: multiply the surrogate, never a denominator.
      segments_BT: i32[B, T], ids 1.. of packed sequences, 0 on padding; one a row by default.
      **hyperparameters: override the preset's; None means the preset's value. May be traced.

    Returns:
      (loss to minimise, metrics of this batch).

    Raises:
      ValueError: an unknown objective or hyperparameter, a value out of its domain, a dtype other
        than f32 or f64, kl_coef ≠ 0 without ref_logp_BT (p3o, whose KL is to π_old, excepted).
    """
    objective = resolve(objective, **hyperparameters)
    if ref_logp_BT is None and objective.needs_reference:
        raise ValueError("kl_coef ≠ 0 needs ref_logp_BT, the reference's log-probabilities")
    return finish(
        policy_terms(
            objective,
            logp_BT,
            old_logp_BT,
            advantages_B,
            mask_BT,
            ref_logp_BT=ref_logp_BT,
            kl=kl,
            weights_BT=weights_BT,
            segments_BT=segments_BT,
        )
    )
