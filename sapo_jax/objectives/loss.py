"""The loss of an objective: mask → ratio → gate → aggregate → divide once.

Every method here maximises an aggregate of surrogates whose gradient is Σ c·A·∇log π_θ;
`policy_loss` returns its negative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.objectives.aggregations import aggregate, divisor
from sapo_jax.objectives.gates import TokenInputs
from sapo_jax.objectives.kl import kl_estimate, kl_to_old
from sapo_jax.objectives.presets import Objective, Switch, resolve
from sapo_jax.objectives.ratios import LOG_RATIO_BOUND, RATIOS, bounded, clip_tokens, finite_logp
from sapo_jax.types import Max, Min

sg = jax.lax.stop_gradient


def _of_the_chosen(function: Callable) -> Callable:
    """A function of an objective, applied to the member that a switch's index chooses."""

    @functools.wraps(function)
    def call(objective: Objective | Switch, *arguments, **more):
        if isinstance(objective, Objective):
            return function(objective, *arguments, **more)
        branches = [functools.partial(function, m, *arguments, **more) for m in objective.members]
        return jax.lax.switch(jnp.asarray(objective.index, jnp.int32), branches)

    return call


@_of_the_chosen
def token_inputs(
    objective: Objective,
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    segments_BT: jax.Array | None = None,
) -> tuple[TokenInputs, jax.Array]:
    """What the gate sees, and where the reduced log-ratio was clipped to ±20 (bool[B, T]).

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
    logp_BT = finite_logp(logp_BT, mask_BT)
    old_logp_BT = sg(finite_logp(old_logp_BT, mask_BT))
    log_ratio_BT = logp_BT - old_logp_BT
    if objective.ratio == "geo_clipped":
        hp = objective.hyperparameters
        log_ratio_BT = clip_tokens(log_ratio_BT, advantages_BT, hp["eps_low"], hp["eps_high"])
    log_ratio_BT = RATIOS[objective.ratio](log_ratio_BT, mask_BT, segments_BT)
    clipped_BT = mask_BT & (jnp.abs(log_ratio_BT) > LOG_RATIO_BOUND)
    log_ratio_BT = masked.keep(bounded(log_ratio_BT), mask_BT)
    return TokenInputs(logp_BT, old_logp_BT, log_ratio_BT, advantages_BT), clipped_BT


@_of_the_chosen
def coefficients(
    objective: Objective, inputs: TokenInputs, mask_BT: jax.Array
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
        surrogate_BT = objective.gate(shifted, objective.hyperparameters)
        return jnp.sum(masked.keep(surrogate_BT, mask_BT))

    gradient_BT = jax.grad(total)(jnp.zeros_like(inputs.logp))
    counted_BT = mask_BT & (inputs.advantages != 0)
    safe_BT = jnp.where(counted_BT, inputs.advantages, 1)
    return masked.keep(gradient_BT / safe_BT, counted_BT), counted_BT


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
    objective = objective.with_hyperparameters(hp)
    inputs, clipped_BT = token_inputs(
        objective, logp_BT, old_logp_BT, advantages_B, mask_BT, segments_BT
    )
    loss_BT, kl_ref_BT = _losses(objective, inputs, mask_BT, ref_logp_BT, kl, weights_BT)
    terms = {"policy/kl_old": masked.mean(sg(kl_to_old(inputs.log_ratio)), mask_BT)}
    if kl_ref_BT is not None:
        terms["policy/kl_ref"] = masked.mean(sg(kl_ref_BT), mask_BT)
    terms["loss"] = aggregate(
        loss_BT,
        mask_BT,
        objective.aggregation,
        segments_BT=segments_BT,
        max_length=hp.get("max_length"),
    )
    return terms | _gate_metrics(objective, inputs, clipped_BT, mask_BT)


def _losses(objective, inputs, mask_BT, ref_logp_BT, kl, weights_BT):
    """The loss of each token, and its KL to the reference where there is one, f[B, T]."""
    hp, kl_ref_BT = objective.hyperparameters, None
    loss_BT = -objective.gate(inputs, hp)
    if weights_BT is not None:
        loss_BT = loss_BT * sg(masked.keep(weights_BT, mask_BT))
    if objective.kl_against == "old":
        loss_BT = loss_BT + hp["kl_coef"] * kl_to_old(inputs.log_ratio)
    if ref_logp_BT is not None:
        kl_ref_BT = kl_estimate(inputs.logp, finite_logp(ref_logp_BT, mask_BT), kl)
        if objective.kl_against == "ref":
            loss_BT = loss_BT + hp["kl_coef"] * kl_ref_BT
    return loss_BT, kl_ref_BT


def by_token(objective: Objective | Switch) -> bool:
    """Whether a token's loss depends on its own log π_θ alone: no ratio is of a whole sequence."""
    members = objective.members if isinstance(objective, Switch) else (objective,)
    return all(member.ratio == "token" for member in members)


@_of_the_chosen
def divisors(
    objective: Objective, mask_BT: jax.Array, segments_BT: jax.Array | None, dtype: Any
) -> jax.Array:
    """What the loss of each token is divided by before the sum, f[B, T]."""
    found = divisor(mask_BT, objective.aggregation, segments_BT, dtype)
    return jnp.ones(mask_BT.shape, dtype) if found is None else found


@_of_the_chosen
def token_losses(
    objective: Objective,
    logp_T: jax.Array,
    old_logp_T: jax.Array,
    advantages_T: jax.Array,
    mask_T: jax.Array,
    *,
    ref_logp_T: jax.Array | None = None,
    kl: str = "k3",
    weights_T: jax.Array | None = None,
) -> jax.Array:
    """The loss of some tokens, f[T], of an objective `by_token`: their sum, each over its
    `divisors`, is the numerator of `policy_terms`.
    """
    logp, old_logp, advantages, mask, ref_logp, weights = (
        None if x is None else x[None]
        for x in (logp_T, old_logp_T, advantages_T, mask_T, ref_logp_T, weights_T)
    )
    inputs, _ = token_inputs(objective, logp, old_logp, advantages, mask)
    return _losses(objective, inputs, mask, ref_logp, kl, weights)[0][0]


def _gate_metrics(objective, inputs, clipped_BT, mask_BT) -> dict[str, Any]:
    c_BT, counted_BT = coefficients(objective, inputs, mask_BT)
    c_BT = jnp.where(clipped_BT, 0, c_BT)
    r_BT = sg(inputs.ratio)
    one = jnp.ones((), r_BT.dtype)
    return {
        "policy/ratio_max": Max(jnp.max(jnp.where(mask_BT, r_BT, -jnp.inf))),
        "policy/ratio_min": Min(jnp.min(jnp.where(mask_BT, r_BT, jnp.inf))),
        "policy/gate_mean": masked.mean(c_BT / r_BT, counted_BT),
        "policy/clipped": masked.mean((c_BT == 0) * one, counted_BT),
        "policy/log_ratio_clipped": masked.mean(clipped_BT * one, mask_BT),
    }


def policy_loss(
    objective: str | Objective | Switch,
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
      objective: a name in OBJECTIVES, an Objective, or a Switch.
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
    terms = policy_terms(
        objective, logp_BT, old_logp_BT, advantages_B, mask_BT,
        ref_logp_BT=ref_logp_BT, kl=kl, weights_BT=weights_BT, segments_BT=segments_BT,
    )  # fmt: skip
    return masked.finish(terms)
