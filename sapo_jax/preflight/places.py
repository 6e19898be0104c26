"""How many runs of a sweep a slice holds at a time, and what one of them takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.preflight import chips, demands, programs
from sapo_jax.preflight.measure import measure, too_large
from sapo_jax.training.settings import Settings

Fields = Mapping[str, int]


def shapes(settings: Settings, devices: int) -> Iterator[dict[str, int]]:
    """Fields of the config for runs side by side, the most first, on fewer devices each.

    Meshes are those that differ least from the config's. A chip has as many rows at a time as
    there, in an update and in decoding.
    """
    c, parts = settings.config, sharding.parts(settings.mesh)
    rows = c.batch.prompts * c.batch.group_size // c.batch.minibatches
    for count in (n for n in range(devices, 0, -1) if devices % n == 0):
        wanted = dict(settings.mesh.shape) | {"run": count}
        mesh = sharding.nearest(wanted, devices, params.dimensions(settings.model))
        if mesh is None:
            continue
        own = devices // count // mesh["tensor"]
        micro_batches = max(1, c.batch.micro_batches * parts // own)
        slots = max(own, c.sampler.slots * own // parts) if c.sampler.slots else 0
        if rows % micro_batches == 0:
            shape = {f"mesh.{axis}": size for axis, size in mesh.items()}
            yield shape | {"batch.micro_batches": micro_batches, "sampler.slots": slots}


def most_runs(settings_of: Callable[[Fields], Settings], topology: str) -> list[dict[str, Any]]:
    """Compile programs for fewer and fewer runs at a time, until all of them fit.

    Args:
      settings_of: the config with some fields changed.
      topology: of the slice.

    Returns:
      For each number of runs that was tried: its fields, the most bytes of a program ("total"; None
      where the compiler refused), whether it fits with room to spare, and, of the last, the seconds
      of an iteration at least.
    """
    chip, devices = chips.chip_of(topology), chips.parse(topology)[1]
    tried = []
    for fields in shapes(settings_of({}), devices):
        try:
            settings = settings_of(fields)
        except ValueError:  # rows, say, that do not divide
            continue
        tried.append({"runs": fields["mesh.run"], "fields": fields} | _measured(settings, chip))
        if tried[-1]["fits"]:
            break
    return tried


def _measured(settings: Settings, chip: chips.Chip) -> dict[str, Any]:
    found, room = programs.programs(settings), (1 - demands.SPARE) * chip.hbm
    total, seconds = 0, 0.0
    # Parameters, moments and gradients alone, before minutes of compiling.
    needed = found["update"].arguments
    needed = programs.bytes_per_chip((needed, needed["parameters"]))
    if needed > room:
        return {"total": needed, "fits": False, "seconds": None}
    for name in sorted(found, key="update".__ne__):
        print(
            f"compiling: {name}, {sharding.runs(settings.mesh)} runs", file=sys.stderr, flush=True
        )
        try:
            result = measure(settings, name, found[name], chip)
        except jax.errors.JaxRuntimeError as error:
            too_large(error)
            return {"total": None, "fits": False, "seconds": None}
        total = max(total, result["memory"]["total"])
        seconds += result["runs"] * result["step_seconds"]
        if total > room:
            return {"total": total, "fits": False, "seconds": None}
    return {"total": total, "fits": True, "seconds": seconds}
