"""What preflight demands of a run's programs."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.preflight import costs, hlo
from sapo_jax.training.settings import Settings

SPARE = 0.10  # of a chip's memory stays free
EXECUTED = 1.40  # times the model's FLOPs, in an update
EXECUTED_LORA = 1.58  # there a layer that is computed again is a third of the whole, not a quarter
VOCABULARY = 1024  # a smaller one shares its size with other dimensions
WHOLE = 0.5  # of the layers' parameters lie whole along `fsdp` at a time
GIB = 2**30


class Check(NamedTuple):
    """A demand; met if the value is at most the limit."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit


def _part(mesh: Mesh | None, axis: str, size: int, *, fsdp: bool) -> int:
    """What a device has of a dimension, or would have if `fsdp` split nothing."""
    over = [a for a in sharding.TABLE[axis][0] if fsdp or a != "fsdp"] if mesh else []
    return size // math.prod(mesh.shape[a] for a in over)


def _sizes(shape: Iterable[int]) -> list[int]:
    """The dimensions in any order; the compiler transposes, and adds some of size 1."""
    return sorted(n for n in shape if n > 1)


def logits_rows(buffers: Iterable[costs.Buffer], settings: Settings, mesh: Mesh | None) -> int:
    """Rows of the largest buffer over the vocabulary that does not have a parameter's shape."""
    config = settings.model
    part = _part(mesh, "vocab", config.vocab_size, fsdp=True)
    width = _part(mesh, "embed", config.hidden_size, fsdp=True)
    shapes = itertools.product((part, config.vocab_size), (width, config.hidden_size))
    weights = [_sizes(shape) for shape in shapes]
    found = (hlo.dimensions(b.shape) for b in buffers)
    logits = [d for d in found if {part, config.vocab_size} & {*d} and _sizes(d) not in weights]
    return max((math.prod(dims) // part for dims in logits), default=0)


def _gathered(spec: params.Spec, settings: Settings) -> list[list[int]]:
    """The sizes of a buffer with a parameter of all layers, whole along `fsdp`."""
    sizes = [
        _part(settings.mesh, axis, n, fsdp=False) if axis in sharding.TABLE else n
        for axis, n in zip(spec.axes, spec.shape, strict=True)
    ]
    found = [_sizes((len(spec.layers), *sizes))]
    if "head_dim" in spec.axes:  # matmuls take heads and their widths as one
        at = spec.axes.index("head_dim") - 1
        sizes[at : at + 2] = [math.prod(sizes[at : at + 2])]
        found.append(_sizes((len(spec.layers), *sizes)))
    return found


def gathered_share(buffers: Iterable[costs.Buffer], settings: Settings) -> float:
    """The share of the layers' parameters that have a buffer whole along `fsdp`, for all layers.

    One of activations may have the sizes of a parameter by chance.
    """
    if settings.mesh is None or settings.mesh.shape["fsdp"] == 1:
        return 0.0
    held = {tuple(_sizes(hlo.dimensions(b.shape))) for b in buffers}
    matrices = [s for s in params.layer_table(settings.model).values() if s.fan_in]
    whole = [s for s in matrices if any(tuple(x) in held for x in _gathered(s, settings))]
    sizes = (sum(math.prod(s.shape) * len(s.layers) for s in specs) for specs in (whole, matrices))
    return operator.truediv(*sizes)


def gathered_limit(settings: Settings) -> int:
    """Bytes of the parameters outside of the layers, whole but for `tensor`, as they are used."""
    mesh = settings.mesh
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    outside = [x for name, x in params.table(settings.model).items() if name != "layers"]
    return sum(
        4 * math.prod(spec.shape) // (tensor if "vocab" in spec.axes else 1)
        for spec in jax.tree.leaves(outside)
    )


def _gathers(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in result["collectives"] if c["kind"] == "all-gather"]


def _of_learner(settings: Settings, result: dict[str, Any]) -> list[Check]:
    """What `score` and `update` may keep of parameters that other devices hold."""
    name = result["program"]
    outside = sum(c["once"] for c in _gathers(result) if not c["in_layers"])
    limit = gathered_limit(settings) / GIB
    found = [
        Check(f"{name}: gathered outside of layers, GiB", outside / GIB, limit),
        Check(f"{name}: share of layers gathered at once", result["gathered_share"], WHOLE),
    ]
    if name == "update":
        ratio = result["flops"] / result["model_flops"]
        limit = EXECUTED_LORA if settings.model.lora_rank else EXECUTED
        found.append(Check("update: executed / model FLOPs", ratio, limit))
    return found


def _of_decode(settings: Settings, result: dict[str, Any]) -> list[Check]:
    """Temporaries, and that what travels is rows on their way to experts, not weights."""
    memory, mesh = result["memory"], settings.sampler_mesh
    kinds = memory["kinds"]
    limit = (kinds["cache"] + 0.1 * kinds["sampler's parameters"]) / GIB
    rows = settings.plan.slots[0] * settings.plan.rows[0]
    rows *= (1 if mesh is None else mesh.shape["expert"]) / sharding.parts(mesh)
    gathered = max((c["largest"] for c in _gathers(result)), default=0)
    hidden = 4 * rows * settings.model.hidden_size
    return [
        Check("decode: temporaries, GiB", memory["temporaries"] / GIB, limit),
        Check("decode: largest array gathered, MB", gathered / 1e6, hidden / 1e6),
    ]


def checks(settings: Settings, results: Sequence[dict[str, Any]], hbm: float) -> list[Check]:
    """Every demand, with what was measured."""
    found = []
    plan, group = settings.plan, settings.config.batch.group_size
    drawn = max(plan.slots[0] * plan.rows[0], plan.refill * group)
    logits = max(settings.hp.static.head_chunk, drawn // sharding.parts(settings.sampler_mesh))
    for r in results:
        name = r["program"]
        total = r["memory"]["total"] / GIB
        found.append(Check(f"{name}: memory, GiB", total, (1 - SPARE) * hbm / GIB))
        if (
            settings.model.vocab_size >= VOCABULARY and r["model_flops"]
        ):  # else it moves arrays alone
            found.append(Check(f"{name}: rows of logits at a time", r["logits_rows"], logits))
        if name in ("score", "update"):
            found += _of_learner(settings, r)
        if name == "decode":
            found += _of_decode(settings, r)
    return found
