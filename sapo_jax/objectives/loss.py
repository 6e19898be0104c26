"""The loss of an objective: mask → ratio → gate → aggregate → divide once.

Every method here maximises an aggregate of surrogates whose gradient is Σ c·A·∇log π_θ;
`policy_loss` returns its negative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import masked
from sapo_jax.objectives.aggregations import aggregate, divisor
from sapo_jax.objectives.gates import TokenInputs
from sapo_jax.objectives.kl import KL_PENALTIES, kl_penalty, kl_to_old
from sapo_jax.objectives.presets import OBJECTIVES, Objective, Switch, resolve
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


def check_arrays(logp_BT, old_logp_BT, advantages_B, mask_BT, **optional: Any) -> None:
    """Refuse what is not of the shapes and dtypes that `policy_loss` documents.

    Raises:
      ValueError: naming the argument.
    """
    given = {"logp": logp_BT, "old_logp": old_logp_BT, "advantages": advantages_B, "mask": mask_BT}
    given |= {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise ValueError(f"{name} is of {type(x).__name__}: must be an array")
    shape, dtype = logp_BT.shape, logp_BT.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"logp has dtype {dtype}: objectives take float32 or float64")
    if len(shape) != 2:
        raise ValueError(f"logp has shape {shape}: must be [B, T]")
    kinds = {"mask": (jnp.bool_, "bool"), "segments": (jnp.integer, "integers")}
    for name, x in given.items():
        kind, text = kinds.get(name, (dtype, f"{dtype}, as logp is"))
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{name} has dtype {x.dtype}: must be {text}")
        if x.shape != shape and not (name == "advantages" and x.shape == shape[:1]):
            also = f"{shape[:1]} or " if name == "advantages" else ""
            raise ValueError(f"{name} has shape {x.shape}: must be {also}{shape}, of logp")


def _check_values(mask_BT, weights_BT, segments_BT) -> None:
    """Refuse weights and segments out of their ranges; traced values are not looked at."""
    traced = isinstance(mask_BT, jax.core.Tracer)
    if weights_BT is not None and not (traced or isinstance(weights_BT, jax.core.Tracer)):
        weights = np.asarray(weights_BT)[np.asarray(mask_BT)]
        if not np.all((weights >= 0) & (weights < np.inf)):
            raise ValueError(f"weights has {weights.min()}, {weights.max()}: must be ≥ 0, finite")
    if segments_BT is not None and not (traced or isinstance(segments_BT, jax.core.Tracer)):
        segments, width = np.asarray(segments_BT), segments_BT.shape[1]
        inside = segments[np.asarray(mask_BT)]
        if not np.all((segments >= 0) & (segments <= width)) or not np.all(inside >= 1):
            raise ValueError(
                f"segments has ids from {segments.min()} to {segments.max()}: must be 1..{width} "
                "under the mask, and 0 elsewhere or one of these"
            )


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
      ValueError: wrong dtypes or shapes.
    """
    check_arrays(logp_BT, old_logp_BT, advantages_B, mask_BT, segments=segments_BT)
    advantages_BT = advantages_B if advantages_B.ndim == 2 else advantages_B[:, None]
    advantages_BT = masked.keep(jnp.broadcast_to(advantages_BT, logp_BT.shape), mask_BT)
    logp_BT = finite_logp(logp_BT, mask_BT)
    old_logp_BT = sg(finite_logp(old_logp_BT, mask_BT))
    log_ratio_BT = own_BT = logp_BT - old_logp_BT
    if objective.ratio == "geo_clipped":
        hp = objective.hyperparameters
        log_ratio_BT = clip_tokens(own_BT, advantages_BT, hp["eps_low"], hp["eps_high"])
    moves_BT = log_ratio_BT == own_BT
    log_ratio_BT = RATIOS[objective.ratio](log_ratio_BT, mask_BT, segments_BT)
    clipped_BT = mask_BT & (jnp.abs(log_ratio_BT) > LOG_RATIO_BOUND)
    log_ratio_BT = masked.keep(bounded(log_ratio_BT), mask_BT)
    arrays = logp_BT, old_logp_BT, log_ratio_BT, advantages_BT, mask_BT, segments_BT
    return TokenInputs(*arrays, moves=moves_BT & ~clipped_BT), clipped_BT


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
        moved_BT = masked.keep(shift_BT, inputs.moves)
        shifted = inputs._replace(
            logp=inputs.logp + shift_BT, log_ratio=inputs.log_ratio + moved_BT
        )
        surrogate_BT = objective.gate(shifted, objective.hyperparameters)
        return jnp.sum(masked.keep(surrogate_BT, mask_BT))

    gradient_BT = jax.grad(total)(jnp.zeros_like(inputs.logp))
    counted_BT = mask_BT & (inputs.advantages != 0)
    safe_BT = jnp.where(counted_BT, inputs.advantages, 1)
    return masked.keep(gradient_BT / safe_BT, counted_BT), counted_BT


@_of_the_chosen
def temperatures(objective: Objective, advantages_BT: jax.Array) -> jax.Array:
    """τ at each token by the sign of A; SAPO's own where the objective has none, f[B, T]."""
    hp = OBJECTIVES["sapo"].hyperparameters | objective.hyperparameters
    one = hp.get("tau")
    pos, neg = (hp[k] if one is None else one for k in ("tau_pos", "tau_neg"))
    return jnp.where(advantages_BT > 0, pos, neg).astype(advantages_BT.dtype)


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
        ref_logp_BT = finite_logp(ref_logp_BT, mask_BT)
        kl_ref_BT = kl_penalty(inputs.logp, inputs.old_logp, ref_logp_BT, kl)
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
      kl: its estimator, see `objectives.kl`: k1, k2, k3, or corrected for π_old, k1_r, k3_r.
      weights_BT: importance corrections ≥ 0: multiply the surrogate, never a denominator.
      segments_BT: i32[B, T], ids 1..T of packed sequences, 0 on padding; one a row by default.
      **hyperparameters: override the preset's; None means the preset's value. May be traced.

    Returns:
      (loss to minimise, metrics of this batch).

    Raises:
      ValueError: an unknown objective, estimator or hyperparameter, a value out of its domain or no
        scalar, arrays of other shapes or dtypes, kl_coef ≠ 0 without ref_logp_BT (p3o, whose KL is
        to π_old, excepted).
    """
    objective = resolve(objective, **hyperparameters)
    for key, value in objective.hyperparameters.items():
        if np.shape(value) != ():
            raise ValueError(f"{key} has shape {np.shape(value)}: must be a scalar")
    if kl not in KL_PENALTIES:
        raise ValueError(f"kl={kl!r}: must be one of {', '.join(KL_PENALTIES)}")
    more = {"ref_logp": ref_logp_BT, "weights": weights_BT, "segments": segments_BT}
    check_arrays(logp_BT, old_logp_BT, advantages_B, mask_BT, **more)
    _check_values(mask_BT, weights_BT, segments_BT)
    if ref_logp_BT is None and objective.needs_reference:
        raise ValueError("kl_coef ≠ 0 needs ref_logp_BT, the reference's log-probabilities")
    terms = policy_terms(
        objective, logp_BT, old_logp_BT, advantages_B, mask_BT,
        ref_logp_BT=ref_logp_BT, kl=kl, weights_BT=weights_BT, segments_BT=segments_BT,
    )  # fmt: skip
    return masked.finish(terms)
