"""Objectives as data: the dataclass, the domains of hyperparameters, and the table of presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from sapo_jax.objectives import gates
from sapo_jax.objectives.aggregations import AGGREGATIONS
from sapo_jax.objectives.ratios import RATIOS

_POSITIVE = (lambda v: v > 0, "a number > 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "a number ≥ 0")
DOMAINS = {
    "tau": _POSITIVE,
    "tau_pos": _POSITIVE,
    "tau_neg": _POSITIVE,
    "eps_low": _NOT_NEGATIVE,
    "eps_high": _NOT_NEGATIVE,
    "kl_coef": _NOT_NEGATIVE,
    **dict.fromkeys(("sigma", "bound", "scale"), _POSITIVE),
    **dict.fromkeys(("k_pos", "k_neg", "lambda_pos", "lambda_neg"), _POSITIVE),
    **dict.fromkeys(("alpha", "beta"), _NOT_NEGATIVE),
    "dual_clip": (lambda v: v > 1, "a number > 1 (inf switches it off)"),
    "max_length": (lambda v: v >= 1, "a number ≥ 1"),
}


@struct.dataclass
class Objective:
    """One algorithm: static gate, ratio level and aggregation; hyperparameters as traced data.

    Attributes:
      gate: per-token surrogate, see `gates`.
      ratio: a name in RATIOS.
      aggregation: a name in AGGREGATIONS.
      hyperparameters: name → scalar; None where the user has to give one.
      kl_against: what the KL penalty holds the policy to: "ref", the reference policy given as
        ``ref_logp_BT``, or "old", the policy that sampled.
      members: of a switch (see `switch`), its objectives by name, their hyperparameters taken out;
        its own ``aggregation``, where it has one, replaces theirs.
    """

    gate: Callable | None = struct.field(pytree_node=False)
    ratio: str | None = struct.field(pytree_node=False)
    aggregation: str | None = struct.field(pytree_node=False)
    hyperparameters: dict[str, Any]
    kl_against: str = struct.field(pytree_node=False, default="ref")
    members: tuple[tuple[str, Objective], ...] = struct.field(pytree_node=False, default=())

    def __post_init__(self):
        for field, allowed in (
            ("ratio", RATIOS), ("aggregation", AGGREGATIONS), ("kl_against", ("ref", "old"))
        ):  # fmt: skip
            value = getattr(self, field)
            if value not in allowed and not (self.members and value is None):
                raise ValueError(f"{field}={value!r}: must be one of {', '.join(allowed)}")

    def member(self, index: int) -> Objective:
        """One of a switch's objectives, with the hyperparameters that the switch holds for it."""
        name, bare = self.members[index]
        held = self.hyperparameters.items()
        own = {k.removeprefix(name + "."): v for k, v in held if k.startswith(name + ".")}
        aggregation = self.aggregation or bare.aggregation
        return dataclasses.replace(bare, aggregation=aggregation, hyperparameters=own)

    @property
    def needs_reference(self) -> bool:
        """Whether a KL penalty holds the policy to π_ref; False where its weight is traced."""
        if self.members:
            return any(self.member(i).needs_reference for i in range(len(self.members)))
        kl_coef = self.hyperparameters["kl_coef"]
        known = not isinstance(kl_coef, jax.core.Tracer)
        return self.kl_against == "ref" and known and bool(np.any(kl_coef != 0))


def _preset(gate, ratio, aggregation, kl_against="ref", **hyperparameters) -> Objective:
    hyperparameters = {"kl_coef": 0.0, **hyperparameters}
    return Objective(gate, ratio, aggregation, hyperparameters, kl_against)


def _clipped(ratio: str, aggregation: str, eps_low: float, eps_high: float, **more) -> Objective:
    hyperparameters = {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": float("inf"), **more}
    return _preset(gates.clip, ratio, aggregation, **hyperparameters)


# The coefficient of MHPO at r = 1, e^{−ζ} with ζ = (log 2)^1.5 + (log 2 / 0.8)².
_MHPO_AT_1 = math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)


def _mhpo(scale: float) -> Objective:
    shape = {"bound": 1.5, "k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 2.0, "lambda_neg": 0.8}
    return _preset(gates.mhpo, "token", "seq_mean", scale=scale, **shape)


def _vespo(**hyperparameters) -> Objective:
    return _preset(gates.vespo, "product", "token_mean", **hyperparameters)


OBJECTIVES: dict[str, Objective] = {
    "sapo": _preset(gates.sapo, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    **{
        name: _preset(getattr(gates, name), "token", "seq_mean", tau_pos=1.0, tau_neg=1.05)
        for name in ("sapo_erf", "sapo_arctan", "sapo_softsign")
    },
    "grpo": _clipped("token", "seq_mean", 0.2, 0.2),
    "gspo": _clipped("sequence", "seq_mean", 3e-4, 4e-4),
    "gspo_token": _clipped("sequence_token", "seq_mean", 3e-4, 4e-4),
    "dapo": _clipped("token", "token_mean", 0.2, 0.28),
    "dr_grpo": _clipped("token", "const_len", 0.2, 0.2, max_length=None),
    "ppo": _clipped("token", "token_mean", 0.2, 0.2),
    "cispo": _preset(gates.cispo, "token", "token_mean", eps_low=1.0, eps_high=4.0),
    "p3o": _preset(gates.p3o, "token", "seq_mean", kl_against="old", tau=4.0, kl_coef=0.1),
    "reinforce": _preset(gates.reinforce, "token", "seq_mean"),
    "gmpo": _preset(gates.importance, "geo_clipped", "seq_mean", eps_low=0.4, eps_high=0.4),
    "luspo": _clipped("sequence", "seq_sum", 3e-4, 4e-4),
    "maspo": _preset(gates.maspo, "token", "token_mean", sigma=1.0, alpha=0.3, beta=0.03),
    "mhpo": _mhpo(1.0),
    "mhpo_unit": _mhpo(1 / _MHPO_AT_1),
    "vespo": _vespo(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0),
}


def switch(objectives: Sequence[str] | Mapping[str, Objective]) -> Objective:
    """Several objectives as one, of which the traced hyperparameter ``index`` chooses.

    Its hyperparameters are ``index`` and those of its members as ``<member>.<name>``. An override
    without a member's name ("tau_neg") goes to every member that has one of that name. Runs of
    different objectives share one executable; under `jax.vmap` all members are computed.

    Args:
      objectives: names of presets, or objectives by names of yours; ``index`` counts them.

    Raises:
      ValueError: an unknown or repeated name, a name with a dot, or none at all.
    """
    if not isinstance(objectives, Mapping):
        wrong = [n for n in objectives if n not in OBJECTIVES]
        if wrong or len(set(objectives)) != len(objectives):
            raise ValueError(
                f"switch({list(objectives)}): must be different names of {', '.join(OBJECTIVES)}"
            )
        objectives = {name: OBJECTIVES[name] for name in objectives}
    if not objectives or any("." in name for name in objectives):
        raise ValueError(f"switch({list(objectives)}): needs objectives, with no dot in a name")
    members = tuple((n, o.replace(hyperparameters=())) for n, o in objectives.items())
    held = {f"{n}.{k}": v for n, o in objectives.items() for k, v in o.hyperparameters.items()}
    return Objective(None, None, None, {"index": 0, **held}, members=members)
