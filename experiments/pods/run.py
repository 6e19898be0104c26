"""Do the pod configs fit? Compiles their programs for each pod, and writes what comes out.

    make preflight

Results go to results/<config>-<topology>.json, the tables made of them to docs/preflight.md, and
what the runs take to docs/pods.md; ``--table`` writes them from the results that are there.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

from sapo_jax import cli
from sapo_jax.preflight import chips
from sapo_jax.report.preflight_tables import GIB, markdown, markdown_table, of_model

FLAGS = cli.Flags("experiments.pods.run", __doc__)
FLAGS.boolean("table", False, "Only write the tables.")

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PODS = (  # config, topology, runs side by side
    ("pod/qwen3_0_6b_v5e", "v5e:4x4", 4),
    ("pod/qwen3_4b_v5e", "v5e:4x4", 1),
    ("pod/qwen3_8b_v6e", "v6e:4x4", 1),
    ("pod/qwen3_30b_a3b_v5p", "v5p:4x4x4", 1),
    ("pod/qwen3_30b_a3b_v5p", "v5p:4x4x8", 1),
    ("paper/controlled", "v5p:4x4x8", 2),
    ("paper/multitask", "v5p:4x4x8", 1),
    ("paper/qwen3_vl_30b_a3b", "v5p:4x4x4", 1),
)
PRICES = {"v5e": 1.2, "v6e": 2.7, "v5p": 4.2}  # dollars a chip and hour, on demand in the US
RUNS = re.compile(r"(?<=<!-- runs -->\n).*?(?=<!-- /runs -->)", re.DOTALL)  # in docs/pods.md
INTRODUCTION = """# Preflight

    pip install "jax[tpu]"    # brings the compiler for TPUs; no TPU is needed
    sapo-jax preflight --config=pod/qwen3_4b_v5e --topology=v5e:4x4

compiles every program of a run for a pod that is not there, the same functions that train, and
tells for each: memory of a chip by kind, executed against model FLOPs, bytes, collectives, and the
least time that it can take. It exits with 1 where something does not fit with 10% to spare. `--fit`
searches the largest micro-batch that fits, `--runs` how many runs of a [sweep](sweeps.md#on-a-mesh)
fit side by side. [Pods](pods.md) says how to start what fits.

## The pod configs, compiled ahead of time

"""
DETAILS = """## Program by program

Written by `make preflight` from the results of [experiments/pods](../experiments/pods/README.md):
every program of an iteration, compiled with libtpu for the pod named, on a machine without a TPU.
Nothing here was measured on one. Times are lower bounds: the largest of FLOPs, bytes of memory and
bytes between chips, each over what the chip can do; the MFU that follows is an upper one. "decode"
is one step with all rows at full length, "grow" the last one of a layer's cache. FLOPs are of
matmuls and kernels, each loop's body as often as it turns; the model's are 6·N_active + 6·L·H·d·S a
token (causal), the head's for completion tokens alone. Memory includes what lies on a chip while
the program runs: the optimizer during a rollout, say, or the copy of the state on which the update
is tried at the start.

"""


def _path(config: str, topology: str, runs: int) -> pathlib.Path:
    name = config.removeprefix("pod/").replace("/", "_")
    together = f"-{runs}-runs" if runs > 1 else ""
    return HERE / "results" / f"{name}-{topology.replace(':', '-')}{together}.json"


def stored() -> list[dict[str, Any]]:
    """The results that are there, each with its config."""
    paths = [(config, _path(config, *pod)) for config, *pod in PODS]
    found = ((config, json.loads(path.read_text())) for config, path in paths if path.exists())
    return [{"runs": 1, "config": config, **report} for config, report in found]


def verdict(reports: list[dict[str, Any]]) -> str:
    """Which demands are not met, if any."""
    missed = [
        f"- `{report['name']}`, `{report['topology']}`: {c['name']} is {c['value']:.2f}, "
        f"at most {c['limit']:.2f} is wanted"
        for report in reports
        for c in report["checks"]
        if not c["met"]
    ]
    missed += [
        f"- `{report['name']}`, `{report['topology']}`: {name} does not fit: {why}"
        for report in reports
        for name, why in report["refused"].items()
    ]
    if missed:
        return "\n".join(["Demands that are not met:", "", *missed])
    return (
        "Every demand is met: 10% of the memory free, an update of at most 1.40 times the model's "
        "FLOPs, no logits of whole rows, no parameters gathered but those of one layer and of the "
        "vocabulary, none at all in decoding, whose temporaries stay within the cache and 10% of "
        "the weights."
    )


def effort(reports: list[dict[str, Any]]) -> str:
    """How long all of it took, and on what."""
    seconds = sum(r["compile_seconds"] for report in reports for r in report["programs"])
    found = reports[0]["compiled_with"]
    return (
        f"All compiles together took {seconds / 60:.0f} minutes on {found['cores']} CPU cores "
        f"(jax {found['jax']}, libtpu {found['libtpu']})."
    )


def moved(reports: list[dict[str, Any]]) -> str:
    """Collectives of the updates as a table."""
    lines = [("config, topology", "collective", "where", "count", "GB", "largest, MB")]
    for report in reports:
        where = f"`{report['name']}`, `{report['topology']}`"
        updates = (r["collectives"] for r in report["programs"] if r["program"] == "update")
        for c in sorted(itertools.chain(*updates), key=lambda c: -c["bytes"]):
            place = "in the loop over layers" if c["in_layers"] else "outside"
            sizes = (f"{c['bytes'] / 1e9:.2f}", f"{c['largest'] / 1e6:.2f}")
            lines.append((where, c["kind"], place, str(c["count"]), *sizes))
            where = ""
    return markdown_table(lines)


def _in_short(report: dict[str, Any]) -> list[str]:
    where = [f"`{report['name']}`", f"`{report['topology']}`, {report['mesh']}"]
    if report["refused"]:
        return [*where, f"does not fit ({', '.join(report['refused'])})", *["–"] * 6]
    results, hbm = {r["program"]: r for r in report["programs"]}, report["chip"]["hbm"]
    fullest = max(results.values(), key=lambda r: r["memory"]["total"])
    used = f"{fullest['memory']['total'] / GIB:.1f} of {hbm / GIB:.2f} ({fullest['program']})"
    update, decode = results["update"], results["decode"]
    sent = sum(c["bytes"] for c in update["collectives"]) / 1e9
    seconds = sum(r["compile_seconds"] for r in results.values())
    temporaries = decode["memory"]["temporaries"] / GIB
    return [
        *where, used, *of_model(update), f"{sent:.0f}", f"{temporaries:.2f}",
        f"{report['iteration_seconds']:.0f}", f"{seconds / 60:.0f}",
    ]  # fmt: skip


def summary(reports: list[dict[str, Any]]) -> str:
    """Many reports of all programs as one table in Markdown, a row for each."""
    columns = (
        "config", "chips", "memory a chip at most, GiB", "update: executed ÷ model FLOPs",
        "its MFU at most", "its collectives a chip, GB", "decode: temporaries, GiB",
        "an iteration at least, s", "compiled in, min",
    )  # fmt: skip
    return markdown_table([columns, *map(_in_short, reports)])


def runs(reports: list[dict[str, Any]]) -> str:
    """Hours and dollars of whole runs, for docs/pods.md: bounds from below, as the times are."""
    lines = [("config", "chips", "an iteration, s", "iterations", "hours", "chip-hours", "dollars")]
    for report in reports:
        kind, count = chips.parse(report["topology"])
        iterations, own = cli.from_config(report["config"]).iterations, count // report["runs"]
        hours = report["iteration_seconds"] * iterations / 3600
        numbers = (iterations, hours, hours * own, hours * own * PRICES[kind])
        slice_ = f"{own} × {kind} (`{report['topology']}`"
        slice_ += f", {report['runs']} runs side by side)" if report["runs"] > 1 else ")"
        where = f"`{report['name']}`", slice_
        lines.append(
            (*where, f"{report['iteration_seconds']:.0f}", *(f"{x:,.0f}" for x in numbers))
        )
    return markdown_table(lines)


def page(reports: list[dict[str, Any]]) -> str:
    """docs/preflight.md."""
    said = f"{summary(reports)}\n{verdict(reports)}\n\n{effort(reports)}\n"
    tables = f"{DETAILS}{markdown(reports)}"
    collectives = f"## Collectives of an update, on each chip\n\n{moved(reports)}"
    return f"{INTRODUCTION}{said}\n{tables}\n{collectives}"


def main(given: cli.Flags) -> None:
    """Compile for every pod, then write the tables."""
    if not given.table:
        (HERE / "results").mkdir(exist_ok=True)
        for config, topology, count in PODS:
            where = f"--config={config}", f"--topology={topology}", f"--config.mesh.run={count}"
            command = [sys.executable, "-m", "sapo_jax.preflight", *where]
            to = f"--json={_path(config, topology, count)}"
            # It exits with 1 where a demand is not met, which the page then says.
            subprocess.run([*command, to], check=False, cwd=ROOT)
    reports = stored()
    (ROOT / "docs" / "preflight.md").write_text(page(reports))
    pods = ROOT / "docs" / "pods.md"
    pods.write_text(RUNS.sub(runs(reports), pods.read_text()))
    print("written: docs/preflight.md, docs/pods.md")


if __name__ == "__main__":
    cli.run(main, FLAGS)
