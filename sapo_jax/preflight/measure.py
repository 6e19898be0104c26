"""A run's programs compiled for a pod that is not there: memory, FLOPs, collectives, time."""

from __future__ import annotations

import collections
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sapo_jax import model
from sapo_jax.model import grouped, params, splash
from sapo_jax.parallel import sharding
from sapo_jax.preflight import chips, costs, demands, hlo, programs
from sapo_jax.preflight.programs import Program
from sapo_jax.training.settings import Settings

FIELDS = ("count", "once", "bytes", "largest")  # of collectives: "once" is each turn's bytes


def stand_in(config: ConfigDict) -> ConfigDict:
    """The config with stand-ins for what shapes no program: data, tokenizer, and weights.

    A Hugging Face directory that is not here gives its shape by its name: that of the preset with
    the same, which base models (…-Base) have, too.
    """
    c = ConfigDict(config.to_dict(), type_safe=False)
    directory = epath.Path(c.model.preset)
    preset = directory.name.lower().replace("-", "_").replace(".", "_").removesuffix("_base")
    if not (directory / "config.json").exists() and preset in model.PRESETS:
        c.model.preset = preset
    if c.tokenizer.directory:
        name = "count_shapes" if c.data.max_image_tokens else "chain_sum"
        c.task, c.tasks = ConfigDict({"name": name, "options": {}}), ConfigDict()
        c.tokenizer.update(directory="", system="", template_options=ConfigDict())
        c.evals, c.eval.every, c.eval.best = ConfigDict(), 0, "mean"
    return c


def _attention(matmuls: int, patches: int) -> costs.Kernel:
    """Of rows that are images, each token's to all others."""

    def count(instruction: hlo.Instruction, computation: hlo.Computation) -> float:
        floats = ("bf16[", "f32[")
        shapes = [computation[name].shape for name in instruction.operands]
        *heads, rows, width = hlo.dimensions(next(s for s in shapes if s.startswith(floats)))
        scores = rows * rows if rows == patches else splash.executed_scores(rows)
        return 2 * matmuls * math.prod(heads) * scores * width

    return count


def kernels(settings: Settings, program: Program) -> dict[str, costs.Kernel]:
    """FLOPs of the Pallas kernels, by how their names start.

    Which rows of a grouped matmul are computed depends on the routing: here every expert is chosen
    as often as the others.
    """
    config, devices = settings.model, 1 if program.mesh is None else program.mesh.shape["expert"]
    tokens = program.tokens // sharding.parts(program.mesh) * devices
    experts, k = config.num_experts, config.num_experts_per_tok

    def of_experts(instruction: hlo.Instruction, computation: hlo.Computation) -> float:
        rows = grouped.visited_rows(tokens, k, experts, experts // devices)
        left = hlo.dimensions(computation[instruction.operands[-2]].shape)
        out = hlo.dimensions(instruction.shape)
        return 2 * rows * out[-1] * (out[-2] if len(out) == 3 else left[-1])

    room = settings.images
    patches = splash.padded(room.tokens * config.vision.merged) if room else 0
    # The backward kernel computes scores, their gradient, and the gradients of q, k and v.
    return {
        "splash_mha_fwd": _attention(2, patches), "splash_mha_dkv": _attention(5, patches),
        "gmm": of_experts, "tgmm": of_experts,
    }  # fmt: skip


def _collectives(settings: Settings, name: str, found: list[costs.Collective]) -> list[dict]:
    """Collectives by kind, inside and outside of the loop over layers."""
    repeats = {stack.repeats for stack in params.layer_stacks(settings.model)}
    around = int(name in ("score", "update") and settings.hp.static.micro_batches > 1)
    rows: dict[tuple, dict] = {}
    for c in found:
        inside = len(c.loops) > around and c.loops[around] in repeats
        row = rows.setdefault((c.kind, inside), dict.fromkeys(FIELDS, 0))
        row["count"] += c.times
        row["once"] += c.bytes
        row["bytes"] += c.times * c.bytes
        row["largest"] = max(row["largest"], c.bytes)
    return [{"kind": kind, "in_layers": inside, **row} for (kind, inside), row in rows.items()]


def _memory(program: Program, compiled: Any) -> dict[str, Any]:
    """Bytes on a chip by kind; "total" is what the compiler has given away, padding included."""
    stats = compiled.memory_analysis()
    sizes = [
        {kind: programs.bytes_per_chip(tree) for kind, tree in trees.items()}
        for trees in (program.arguments, program.resident, program.result)
    ]
    kinds: collections.Counter[str] = collections.Counter()
    for each in sizes:
        kinds.update(each)
    _, resident, result = (sum(each.values()) for each in sizes)
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + fresh
    total = stats.argument_size_in_bytes + needed + resident
    return {"kinds": dict(kinds), "temporaries": needed - result, "total": total}


def measure(settings: Settings, name: str, program: Program, chip: chips.Chip) -> dict[str, Any]:
    """Compile a program and say what it takes on each chip.

    Raises:
      jax.errors.JaxRuntimeError: among others, it does not fit the chip's memory.
    """
    start = time.monotonic()
    compiled = hlo.compiled(program.lower())
    seconds = time.monotonic() - start
    parsed = hlo.parse(compiled.as_text())
    buffers = costs.buffers(parsed)
    parsed = hlo.turn(parsed) if program.one_turn else parsed
    devices = 1 if settings.mesh is None else settings.mesh.size // sharding.runs(settings.mesh)
    flops = costs.flops(parsed, unknown=program.turns, kernels=kernels(settings, program))
    moved = _collectives(settings, name, costs.collectives(parsed, unknown=program.turns))
    traffic = costs.memory_bytes(parsed, unknown=program.turns)
    linked = sum(row["bytes"] * (1 + (row["kind"] == "all-reduce")) for row in moved)
    bounds = {
        "compute": flops / chip.flops, "memory": traffic / chip.bandwidth,
        "links": linked / chip.link,
    }  # fmt: skip
    model_flops = program.model_flops / devices
    step = max(bounds.values())
    return {
        "program": name,
        "memory": _memory(program, compiled),
        "flops": flops,
        "model_flops": model_flops,
        "bytes": traffic,
        "collectives": moved,
        "largest_buffers": [b._asdict() for b in buffers[:12]],
        "logits_rows": demands.logits_rows(buffers, settings, program.mesh),
        "gathered_share": demands.gathered_share(buffers, settings),
        "bounds": bounds,
        "step_seconds": step,
        "mfu": model_flops / step / chip.flops,
        "runs": program.runs,
        "compile_seconds": seconds,
    }


def too_large(error: jax.errors.JaxRuntimeError) -> str:
    """What the compiler says of a program that does not fit; raises what it says of others."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).splitlines()[0]


def largest_micro_batch(
    settings_of: Callable[[int], Settings], chip: chips.Chip
) -> list[dict[str, Any]]:
    """Compile the update with larger and larger micro-batches, until one does not fit.

    Args:
      settings_of: the run with that many micro-batches.
      chip: of the pod.

    Returns:
      For each that was tried: rows on a chip, bytes ("total" None where the compiler refused), and
      whether it fits with room to spare.
    """
    settings = settings_of(1)
    rows = settings.rows // settings.config.batch.minibatches // sharding.parts(settings.mesh)
    tried, packings = [], []
    for local in (n for n in range(1, rows + 1) if rows % n == 0):
        other = settings_of(rows // local)
        if other.packing is not None and other.packing in packings:
            break  # packed micro-batches do not grow on
        packings.append(other.packing)
        try:
            program = programs.programs(other)["update"]
            total = measure(other, "update", program, chip)["memory"]["total"]
        except jax.errors.JaxRuntimeError as error:
            too_large(error)
            total = None
        fits = total is not None and total <= (1 - demands.SPARE) * chip.hbm
        tried.append({"rows": local, "micro_batches": rows // local, "total": total, "fits": fits})
        if not fits:
            break
    return tried


def _described(mesh: Mesh | None) -> str:
    sizes = {} if mesh is None else mesh.shape
    return sharding.describe({axis: n for axis, n in sizes.items() if n > 1}) or "one device"


def report(
    settings: Settings,
    topology: str,
    only: Sequence[str] | None = None,
    *,
    tpu: bool,
) -> dict[str, Any]:
    """Measure programs, all of them by default, and what is demanded of them.

    Raises:
      ValueError: a program that the run does not have.
    """
    chip, found = chips.chip_of(topology), programs.programs(settings)
    if unknown := set(only or ()) - set(found):
        raise ValueError(f"--programs: {min(unknown)!r} must be one of {', '.join(found)}")
    results, refused = [], {}
    for name, program in found.items():
        if only is None or name in only:
            print(f"compiling: {name}", file=sys.stderr, flush=True)
            try:
                results.append(measure(settings, name, program, chip))
            except jax.errors.JaxRuntimeError as error:
                refused[name] = too_large(error)
    checks = demands.checks(settings, results, chip.hbm)
    where = [_described(settings.mesh)]
    if settings.sampler_mesh != settings.mesh:
        where.append(f"sampler {_described(settings.sampler_mesh)}")
    return {
        "name": settings.config.name,
        "topology": topology,
        "tpu": tpu,
        "mesh": "; ".join(where),
        "runs": sharding.runs(settings.mesh),
        "chip": chip._asdict(),
        "compiled_with": {
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu") if tpu else None,
            "cores": os.cpu_count(),
        },
        "programs": results,
        "refused": refused,
        "checks": [c._asdict() | {"met": c.met} for c in checks],
        "iteration_seconds": sum(r["runs"] * r["step_seconds"] for r in results),
    }
