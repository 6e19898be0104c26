"""Contests of speed: contestants in processes of their own, round after round in turn.

    python -m experiments.benchmarks.run                        # make bench
    python -m experiments.benchmarks.run --peers=.cache/peers   # make bench-peers

A contestant builds and compiles first; then the rounds go around, so that what slows the machine
down slows all of them. `results/results.jsonl` gets a line for each contestant of each contest, and
`results/table.md` and the picture are made of it.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.benchmarks import table
from sapo_jax import cli

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = cli.Flags("experiments.benchmarks.run", __doc__)
FLAGS.words("only", [], "Names of contests, all by default.")
FLAGS.integer("rounds", 5, "Rounds of each contest.", 1)
FLAGS.string("peers", "", "Folder of the peers' environments; '' for none.")
FLAGS.string("out", str(HERE / "results"), "Where the results go.")


class Entry(NamedTuple):
    """A contestant: whose it is, its name there, and the module that has it."""

    label: str
    module: str
    name: str

    @property
    def peer(self) -> str | None:
        """The peer's environment, None for this project's own."""
        folder, _, module = self.module.rpartition(".")
        return module.removeprefix("plain_") if folder else None


def ours(*names: str) -> tuple[Entry, ...]:
    """Contestants of this project."""
    return tuple(Entry(name, "ours", name) for name in names)


TORCH, TUNIX = "peers.plain_torch", "peers.tunix"
UPDATES = (
    *ours("update", "update_packed", "update_rows", "update_grpo"),
    Entry("torch", TORCH, "update"), Entry("trl", TORCH, "trl"), Entry("tunix", TUNIX, "update"),
)  # fmt: skip
GENERATES = (
    *ours("generate"),
    Entry("transformers", TORCH, "generate"), Entry("tunix", TUNIX, "generate"),
)  # fmt: skip
PARTS = ours("update", "products", "attention")  # where the time of an update goes
# contest: (shape, contestants)
CONTESTS: dict[str, tuple[str, tuple[Entry, ...]]] = {
    "update": ("small", UPDATES),
    "update_wide": ("wide", UPDATES),
    "update_long": ("long", UPDATES),
    "update_ragged": ("ragged", UPDATES),
    "parts": ("small", PARTS),
    "parts_wide": ("wide", PARTS),
    "parts_long": ("long", PARTS),
    "objectives": ("small", ours("update", "update_cross_entropy")),
    "generate": ("small", GENERATES),
    "generate_wide": ("wide", GENERATES),
    "generate_ragged": ("ragged", GENERATES),
    "generate_many": ("many", GENERATES),
    "head": ("small", ours("head", "head_products")),
}


def start(entry: Entry, shape: str, peers: str) -> subprocess.Popen:
    """A contestant's process, which builds from now on."""
    python = sys.executable
    if entry.peer:
        python = str(pathlib.Path(peers).absolute() / entry.peer / "bin" / "python")
    command = [python, "-m", f"experiments.benchmarks.{entry.module}", entry.name, shape]
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, text=True, **pipes)


def _line(process: subprocess.Popen, label: str) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{label} ended:\n{process.stderr.read()[-3000:]}")
    return json.loads(line)


def _check_losses(labels: Sequence[str], facts: Sequence[dict[str, Any]]) -> None:
    """Contestants of an objective must have computed the same first loss, or times mean nothing."""
    first: dict[str, tuple[str, float]] = {}
    for label, fact in zip(labels, facts, strict=True):
        if "loss" in fact:
            other, loss = first.setdefault(fact["objective"], (label, fact["loss"]))
            if abs(fact["loss"] - loss) > 1e-5:
                raise RuntimeError(f"first losses: {other} {loss}, {label} {fact['loss']}")


def contest(name: str, rounds: int, peers: str) -> list[dict[str, Any]]:
    """The results of one contest, a record for each contestant and one for the machine."""
    shape, entries = CONTESTS[name]
    entries = (*(e for e in entries if peers or not e.peer), Entry("peak", "ours", "peak"))
    processes, facts, seen = [], [], []
    try:
        for entry in entries:  # one after the other: builds are timed, too
            processes.append(start(entry, shape, peers))
            facts.append(_line(processes[-1], entry.label))
            print(f"{name}: {entry.label} is ready, {facts[-1]}", file=sys.stderr, flush=True)
        _check_losses([entry.label for entry in entries], facts)
        seen = [[] for _ in entries]
        for _ in range(rounds):
            for own, process, entry in zip(seen, processes, entries, strict=True):
                process.stdin.write("\n")
                process.stdin.flush()
                own.append(_line(process, entry.label))
        for process in processes:
            process.stdin.close()
        ends = [_line(p, e.label) for p, e in zip(processes, entries, strict=True)]
    finally:
        for process in processes:
            process.kill()
    load = round(os.getloadavg()[0], 2)
    records = []
    for entry, fact, own, end in zip(entries, facts, seen, ends, strict=True):
        walls = [x["wall_s"] for x in own]
        record = {"contest": name, "shape": shape, "contestant": entry.label, "load": load}
        record |= fact | end | {"walls_s": [round(w, 4) for w in walls]}
        record["wall_s"] = round(statistics.median(walls), 4)
        record["cpu_s"] = round(statistics.median(x["cpu_s"] for x in own), 4)
        if "tokens" in own[0]:  # a rollout's differ from round to round
            rates = [x["tokens"] / x["wall_s"] for x in own]
            record["tokens_per_s"] = round(statistics.median(rates), 1)
        elif "tokens" in record:
            record["tokens_per_s"] = round(record["tokens"] / record["wall_s"], 1)
        records.append(record)
    return records


def main(given: cli.Flags) -> None:
    """Run the contests and write their results."""
    unknown = [name for name in given.only if name not in CONTESTS]
    if unknown:
        raise ValueError(f"--only={','.join(unknown)}: must be among {', '.join(CONTESTS)}")
    out = pathlib.Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    records = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    for name in given.only or CONTESTS:
        found = contest(name, given.rounds, given.peers)
        records = [r for r in records if r["contest"] != name] + found
        records.sort(key=lambda r: [*CONTESTS].index(r["contest"]))
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        print(table.of(found))
    table.write(records, out)


if __name__ == "__main__":
    cli.run(main, FLAGS)
