"""What preflight demands of a run's programs, and its results as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sapo_jax import costs, hlo, sharding
from sapo_jax.model import params
from sapo_jax.settings import Settings

SPARE = 0.10  # of a chip's memory stays free
EXECUTED = 1.40  # times the model's FLOPs, in an update
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


def logits_rows(buffers: Iterable[costs.Buffer], settings: Settings) -> int:
    """Rows of the largest buffer over the vocabulary that does not have a parameter's size."""
    config, mesh = settings.model, settings.mesh
    part = config.vocab_size // (1 if mesh is None else mesh.shape["tensor"])
    rows = [0]
    for buffer in buffers:
        dims = hlo.dimensions(buffer.shape)
        if {part, config.vocab_size} & set(dims):
            rows.append(math.prod(dims) // part)
    return max(r for r in rows if r % config.hidden_size or not r)


def gathered_limit(settings: Settings) -> int:
    """Bytes of the parameters outside of the layers, whole but for `tensor`, as they are used."""
    mesh = settings.mesh
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    total = 0
    for name, spec in params.table(settings.model).items():
        if name != "layers":
            split = tensor if "vocab" in spec.axes else 1
            total += 4 * math.prod(spec.shape) // split
    return total


def checks(settings: Settings, results: Sequence[dict[str, Any]], hbm: float) -> list[Check]:
    """Every demand, with what was measured."""
    found = []
    options = settings.config["batch"]
    drawn = settings.plan.slots[0] * options["group_size"] // sharding.parts(settings.mesh)
    for r in results:
        name, memory = r["program"], r["memory"]
        found.append(Check(f"{name}: memory, GiB", memory["total"] / GIB, (1 - SPARE) * hbm / GIB))
        limit = max(settings.hp.head_chunk, drawn)
        found.append(Check(f"{name}: rows of logits at a time", r["logits_rows"], limit))
        if name in ("score", "update"):
            gathered = sum(
                c["once"]
                for c in r["collectives"]
                if c["kind"] == "all-gather" and not c["in_layers"]
            )
            limit = gathered_limit(settings) / GIB
            found.append(Check(f"{name}: gathered outside of layers, GiB", gathered / GIB, limit))
        if name == "update":
            found.append(
                Check("update: executed / model FLOPs", r["flops"] / r["model_flops"], EXECUTED)
            )
        if name == "decode":
            kinds = memory["kinds"]
            limit = kinds["cache"] + 0.1 * kinds["sampler's parameters"]
            found.append(
                Check("decode: temporaries, GiB", memory["temporaries"] / GIB, limit / GIB)
            )
    return found


def _grid(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _memory_columns(results: Sequence[dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for r in results:
        names |= dict.fromkeys(r["memory"]["kinds"])
    return list(names)


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    results, chip = report["programs"], report["chip"]
    kinds = _memory_columns(results)
    memory = [["GiB a chip", *kinds, "temporaries", "total", f"of {chip['hbm'] / GIB:.2f}"]]
    speed = [["a chip", "GFLOP", "÷ model", "GB moved", "compute s", "memory s", "links s", "MFU",
              "compiled in s"]]  # fmt: skip
    moved = [["program", "collective", "where", "count", "GB", "largest MB"]]
    for r in results:
        m, total = r["memory"], r["memory"]["total"]
        cells = [f"{m['kinds'].get(k, 0) / GIB:.2f}" for k in (*kinds,)]
        cells += [f"{m['temporaries'] / GIB:.2f}", f"{total / GIB:.2f}"]
        memory.append([r["program"], *cells, f"{total / chip['hbm']:.0%}"])
        ratio = f"{r['flops'] / r['model_flops']:.2f}" if r["model_flops"] else "–"
        mfu = f"{r['mfu']:.0%}" if r["model_flops"] else "–"
        speed.append(
            [r["program"], f"{r['flops'] / 1e9:.0f}", ratio, f"{r['bytes'] / 1e9:.1f}",
             *(f"{x:.3f}" for x in r["bounds"].values()), mfu, f"{r['compile_seconds']:.0f}"]
        )  # fmt: skip
        for c in sorted(r["collectives"], key=lambda c: -c["bytes"]):
            where = "layers" if c["in_layers"] else ""
            moved.append(
                [r["program"], c["kind"], where, str(c["count"]), f"{c['bytes'] / 1e9:.3f}",
                 f"{c['largest'] / 1e6:.2f}"]
            )  # fmt: skip
    demands = [["demand", "value", "at most", ""]]
    for c in report["checks"]:
        verdict = "" if c["met"] else "NOT MET"
        demands.append([c["name"], f"{c['value']:.2f}", f"{c['limit']:.2f}", verdict])
    compiled = "as on the pod" if report["tpu"] else (
        "FOR THE CPU, without libtpu: memory, kernels and collectives differ from a pod's"
    )  # fmt: skip
    head = f"{report['name']} on {report['topology']}, {report['mesh']}; compiled {compiled}"
    tail = f"An iteration takes at least {report['iteration_seconds']:.1f} s."
    return "\n\n".join([head, _grid(memory), _grid(speed), _grid(moved), _grid(demands), tail])


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Many reports as one table, a row for each program."""
    lines = [
        "| config, topology, mesh | program | memory a chip, GiB (temporaries) | executed ÷ model "
        "FLOPs | collectives a chip, GB | at least, s | MFU at most | compiled in, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        where = f"`{report['name']}`, `{report['topology']}`, {report['mesh']}"
        for r in report["programs"]:
            m, model = r["memory"], r["model_flops"]
            moved = sum(c["bytes"] for c in r["collectives"]) / 1e9
            used = f"{m['total'] / GIB:.1f} of {report['chip']['hbm'] / GIB:.2f}"
            cells = [
                where, r["program"], f"{used} ({m['temporaries'] / GIB:.1f})",
                f"{r['flops'] / model:.2f}" if model else "–", f"{moved:.2f}",
                f"{r['step_seconds']:.3g}", f"{r['mfu']:.0%}" if model else "–",
                f"{r['compile_seconds']:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            where = ""
    return "\n".join(lines) + "\n"


def fit_text(tried: Sequence[dict[str, Any]], hbm: float) -> str:
    """The search for the largest micro-batch, in words."""
    rows = [["rows a chip", "config.batch.micro_batches", "GiB", f"of {hbm / GIB:.2f}"]]
    for t in tried:
        size = "more" if t["total"] is None else f"{t['total'] / GIB:.2f}"
        fits = "fits" if t["fits"] else "does not fit"
        rows.append([str(t["rows"]), str(t["micro_batches"]), size, fits])
    best = [t for t in tried if t["fits"]]
    found = "No micro-batch fits."
    if best:
        found = f"Largest that fits: --config.batch.micro_batches={best[-1]['micro_batches']}"
    return f"{_grid(rows)}\n\n{found}"
