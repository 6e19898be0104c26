"""Objectives as data: what one is, the table of presets, and choices between several."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sapo_jax import cli
from sapo_jax.objectives import divergences, gates
from sapo_jax.objectives.aggregations import AGGREGATIONS
from sapo_jax.objectives.ratios import RATIOS

_POSITIVE = (lambda v: (v > 0) & (v < np.inf), "a number > 0, finite")
_NOT_NEGATIVE = (lambda v: (v >= 0) & (v < np.inf), "a number ≥ 0, finite")
_DISTANCE = (lambda v: v >= 0, "a number ≥ 0 (inf: no bound)")
DOMAINS = {
    **dict.fromkeys(("tau", "tau_pos", "tau_neg", "sigma", "bound", "scale"), _POSITIVE),
    **{f"tau_{sign}_{side}": _POSITIVE for sign in ("pos", "neg") for side in ("below", "above")},
    **dict.fromkeys(("k_pos", "k_neg", "lambda_pos", "lambda_neg"), _POSITIVE),
    **dict.fromkeys(("kl_coef", "alpha", "beta"), _NOT_NEGATIVE),
    **dict.fromkeys(("low_pos", "low_neg"), _NOT_NEGATIVE),
    **dict.fromkeys(("eps_low", "eps_high", "high_pos", "high_neg"), _DISTANCE),
    **dict.fromkeys(("delta", "delta_low", "delta_high", "delta_prefix"), _DISTANCE),
    "w_min": (lambda v: (v > 0) & (v <= 1), "a number in (0, 1]"),
    "dual_clip": (lambda v: v > 1, "a number > 1 (inf switches it off)"),
    "max_length": (lambda v: v >= 1, "a number ≥ 1"),
}  # hyperparameter: a test of its value, and what that asks for in words


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
      replay: the routing that a mixture of experts replays with it, see `model.routing`.
    """

    gate: Callable = struct.field(pytree_node=False)
    ratio: str = struct.field(pytree_node=False)
    aggregation: str = struct.field(pytree_node=False)
    hyperparameters: dict[str, Any]
    kl_against: str = struct.field(pytree_node=False, default="ref")
    replay: str = struct.field(pytree_node=False, default="none")

    def __post_init__(self):
        hp = self.hyperparameters
        if isinstance(hp, Mapping) and "kl_coef" not in hp:
            object.__setattr__(self, "hyperparameters", {"kl_coef": 0.0, **hp})
        for field, allowed in (
            ("ratio", RATIOS), ("aggregation", AGGREGATIONS), ("kl_against", ("ref", "old"))
        ):  # fmt: skip
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field}={value!r}: must be one of {', '.join(allowed)}")

    def with_hyperparameters(self, values: Mapping[str, Any]) -> Objective:
        """The same with other values."""
        return self.replace(hyperparameters=dict(values))

    def domain(self, key: str) -> tuple[Callable, str]:
        """A test of a hyperparameter's value, and what it asks for in words."""
        return DOMAINS.get(key, (lambda v: v == v, "a number"))

    @property
    def needs_reference(self) -> bool:
        """Whether a KL penalty holds the policy to π_ref; False where its weight is traced."""
        kl_coef = self.hyperparameters["kl_coef"]
        known = not isinstance(kl_coef, jax.core.Tracer)
        return self.kl_against == "ref" and known and bool(np.any(kl_coef != 0))


@struct.dataclass
class Switch:
    """Several objectives, of which a traced index chooses; made by `switch`.

    It is used like an Objective, with the hyperparameters ``index`` and ``<member>.<name>``.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    members: tuple[Objective, ...]
    index: jax.Array | int = 0
    aggregation: str | None = struct.field(pytree_node=False, default=None)  # of all members

    def __post_init__(self):
        if self.aggregation is not None:
            own = {"aggregation": self.aggregation}
            members = tuple(dataclasses.replace(m, **own) for m in self.members)
            object.__setattr__(self, "members", members)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The index, and those of all members."""
        pairs = zip(self.names, self.members, strict=True)
        held = {f"{n}.{k}": v for n, o in pairs for k, v in o.hyperparameters.items()}
        return {"index": self.index, **held}

    def with_hyperparameters(self, values: Mapping[str, Any]) -> Switch:
        """The same with other values."""
        members = tuple(
            member.replace(hyperparameters={k: values[f"{n}.{k}"] for k in member.hyperparameters})
            for n, member in zip(self.names, self.members, strict=True)
        )
        return self.replace(members=members, index=values["index"])

    def domain(self, key: str) -> tuple[Callable, str]:
        """As `Objective.domain`."""
        last = len(self.members) - 1
        if key == "index":
            return lambda v: (v == np.int32(v)) & (v >= 0) & (v <= last), f"an integer in 0..{last}"
        return self.members[0].domain(key.split(".")[-1])

    @property
    def needs_reference(self) -> bool:
        """Whether any member does."""
        return any(member.needs_reference for member in self.members)


def _preset(
    gate, ratio, aggregation, *, kl_against="ref", replay="none", kl_coef=0.0, **more
) -> Objective:
    held = {"kl_coef": kl_coef, **more}
    return Objective(gate, ratio, aggregation, held, kl_against, replay)


def _band(eps_low: float, eps_high: float) -> dict[str, float]:
    return {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": float("inf")}


_MHPO = {"bound": 1.5, "k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 2.0, "lambda_neg": 0.8}
# The coefficient of MHPO at r = 1, e^{−ζ} with ζ = (log 2)^1.5 + (log 2 / 0.8)².
_MHPO_AT_1 = math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)

# A row each: gate, ratio level, aggregation, hyperparameters.
OBJECTIVES: dict[str, Objective] = {
    "sapo": _preset(gates.sapo, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    "sapo_erf": _preset(gates.sapo_erf, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    "sapo_arctan": _preset(gates.sapo_arctan, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    "sapo_softsign": _preset(gates.sapo_softsign, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    "sapo_softsign_abs": _preset(
        gates.sapo_softsign_abs, "token", "seq_mean", tau_pos=1.0, tau_neg=1.05
    ),
    "sapo_quadrant": _preset(
        gates.sapo_quadrant, "token", "seq_mean",
        tau_pos_below=1.0, tau_pos_above=1.0, tau_neg_below=1.05, tau_neg_above=1.05,
    ),
    "sapo_sequence": _preset(gates.sapo, "sequence", "seq_mean", tau_pos=1.0, tau_neg=1.05),
    "grpo": _preset(gates.clip, "token", "seq_mean", **_band(0.2, 0.2)),
    "grpo_r2": _preset(gates.clip, "token", "seq_mean", **_band(0.2, 0.27), replay="R2"),
    "gspo": _preset(gates.clip, "sequence", "seq_mean", **_band(3e-4, 4e-4)),
    "gspo_token": _preset(gates.clip, "sequence_token", "seq_mean", **_band(3e-4, 4e-4)),
    "dapo": _preset(gates.clip, "token", "token_mean", **_band(0.2, 0.28)),
    "dr_grpo": _preset(gates.clip, "token", "const_len", **_band(0.2, 0.2), max_length=None),
    "ppo": _preset(gates.clip, "token", "token_mean", **_band(0.2, 0.2)),
    "cispo": _preset(gates.cispo, "token", "token_mean", eps_low=1.0, eps_high=4.0),
    "p3o": _preset(gates.p3o, "token", "seq_mean", tau=4.0, kl_coef=0.1, kl_against="old"),
    "reinforce": _preset(gates.reinforce, "token", "seq_mean"),
    "gmpo": _preset(gates.importance, "geo_clipped", "seq_mean", eps_low=0.4, eps_high=0.4),
    "luspo": _preset(gates.clip, "sequence", "seq_sum", **_band(3e-4, 4e-4)),
    "maspo": _preset(gates.maspo, "token", "token_mean", sigma=1.0, alpha=0.3, beta=0.03),
    "mhpo": _preset(gates.mhpo, "token", "seq_mean", scale=1.0, **_MHPO),
    "mhpo_unit": _preset(gates.mhpo, "token", "seq_mean", scale=1 / _MHPO_AT_1, **_MHPO),
    "vespo": _preset(
        gates.vespo, "product", "token_mean", k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0
    ),
    "topr": _preset(
        gates.topr, "product", "seq_mean", low_pos=1.0, high_pos=1.0, low_neg=0.0, high_neg=1.0
    ),
    "dppo_tv": _preset(divergences.dppo_tv, "token", "seq_sum", delta_low=0.15, delta_high=0.15),
    "dppo_kl": _preset(divergences.dppo_kl, "token", "seq_sum", delta_low=0.05, delta_high=0.05),
    "cppo": _preset(
        divergences.cppo, "prefix", "seq_sum", delta=0.15, delta_prefix=0.015, w_min=0.8
    ),
}  # fmt: skip


SHIPPED = frozenset(OBJECTIVES)


def register(name: str, objective: Objective | Callable) -> Objective:
    """Give an objective of your own, or one of a gate alone, a name in this process.

    Raises:
      ValueError: the name is one of the project's, or what it is given to is no objective.
    """
    if name in SHIPPED or not name.isidentifier():
        text = "must be a new name of letters, digits and _"
        raise ValueError(f"objectives.register({name!r}, …): {text}")
    OBJECTIVES[name] = _objective(f"objectives.register({name!r}, …)", objective)
    return OBJECTIVES[name]


def named(name: str) -> Objective:
    """The objective of a name, or of a file: "my.py:my_objective".

    In a file it is an `Objective`, or a gate, which stands for the objective that has it at the
    token's ratio, averaged as GRPO does, without hyperparameters.

    Raises:
      ValueError: an unknown name; of a file, what is no objective, or differs between processes.
    """
    if cli.own.is_reference(name):
        objective = _objective(name, cli.own.load(name))
        cli.own.agree(f"objective {name!r}", probe, name)
        return objective
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}, or one of a file, "
            f"my.py:name{cli.nearest(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def _objective(where: str, found: Any) -> Objective:
    if isinstance(found, Objective):
        gate = found.gate
    elif callable(found):
        gate, found = found, Objective(found, "token", "seq_mean", {})
    else:
        raise ValueError(f"{where} is {found!r}: must be an objectives.Objective, or a gate")
    try:
        inspect.signature(gate).bind("x", "hp")
    except TypeError:
        raise ValueError(f"{where}: the gate must take (x, hp), see objectives.gates") from None
    return found


def probe(name: str) -> dict[str, Callable[[], Any]]:
    """The calls on whose results processes have to agree, see `cli.own.agree`."""

    def traced() -> list[str]:
        objective = _objective(name, cli.own.load(name))
        numbers = {k: 1.0 if v is None else v for k, v in objective.hyperparameters.items()}
        tokens = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        shape = gates.TokenInputs(tokens, tokens, tokens, tokens)
        try:
            made = jax.make_jaxpr(objective.gate)(shape, numbers)
        except KeyError as error:
            raise ValueError(
                f"the gate needs the hyperparameter {error}: Objective(gate, 'token', 'seq_mean', "
                f"{{{error}: …}}) declares it"
            ) from None
        if [(x.shape, x.dtype) for x in made.out_avals] != [(tokens.shape, tokens.dtype)]:
            text = ", ".join(map(str, made.out_avals))
            raise ValueError(f"the gate must return one value a token, f32[2, 3], not {text}")
        constants = [np.asarray(x).tolist() for x in made.consts]
        return [re.sub("0x[0-9a-f]+", "", str(made)), str(constants), str(sorted(numbers.items()))]

    return {"its gate": traced}


def switch(objectives: Sequence[str] | Mapping[str, Objective]) -> Switch:
    """Several objectives as one, of which the traced hyperparameter ``index`` chooses.

    Runs of different objectives share one executable; under `jax.vmap` all members are computed.

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
    return Switch(tuple(objectives), tuple(objectives.values()))


def resolve(objective: str | Objective | Switch, **hyperparameters) -> Objective | Switch:
    """A preset or an objective with some hyperparameters overridden (None keeps the preset's).

    Of a switch, a name without a member's ("tau_neg") goes to every member that has one of it.

    Raises:
      ValueError: an unknown name, a hyperparameter that the objective lacks or that is required
        and missing, a value out of its domain (traced values are not looked at).
    """
    name = objective if isinstance(objective, str) else "objective"
    if isinstance(objective, str):
        objective = named(objective)
    values = dict(objective.hyperparameters)
    for key in sorted(hyperparameters, key=lambda k: k.count(".")):  # a member's own come last
        meant = [k for k in values if k == key or k.endswith(f".{key}")]
        if not meant:
            has, near = f"it has {', '.join(values) or 'none'}", cli.nearest(key, values)
            raise ValueError(f"{name} has no hyperparameter {key!r}; {has}{near}")
        if hyperparameters[key] is not None:
            values |= dict.fromkeys(meant, hyperparameters[key])
    for key, value in values.items():
        check, text = objective.domain(key)
        if value is None:
            raise ValueError(f"{name} needs the hyperparameter {key!r}: {text}")
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(value)
        number = jnp.issubdtype(array.dtype, np.number) and array.dtype.kind != "c"
        if not number or not np.all(check(array)):
            raise ValueError(f"{name}: {key}={value} must be {text}")
    return objective.with_hyperparameters(values)
