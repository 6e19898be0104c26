"""SIGKILL at random moments, to one process, to two, to a sweep; then compare, bit for bit.

    python -m experiments.storm.run --kills=60

The same command goes on with a storm that was stopped. Exit status 1: something differs, or hangs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging

from sapo_jax import cli
from sapo_jax.sweep import cohorts
from sapo_jax.training import settings
from sapo_jax.training.workdir import read_metrics
from tests import tiny_config, tiny_sweep
from tests.test_train import digest, final_state, records

# Linux's PR_SET_PDEATHSIG: what a storm that is killed itself has started ends, too.
WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
HERE, ROOT = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[2]
FLAGS = cli.Flags("experiments.storm.run", __doc__)
FLAGS.integer("kills", 60, "SIGKILLs in all.", 1)
FLAGS.integer("seed", 0, "Of the moments.", 0)
FLAGS.string("workdir", "runs/storm", "Of everything; must be new, or a storm's.")
SHARES = {"one process": 7, "two processes": 2, "a sweep": 3}  # of the kills
CONFIG = {  # rewards that differ, so that there is something to learn
    "iterations": 30, "checkpoint.every": 2, "eval.every": 5, "reward.overlong": 1.0,
    "reward.buffer": 6,
}  # fmt: skip
READING = threading.Lock()  # of checkpoints, one after the other
PATIENCE = 20  # times as long as undisturbed: then it hangs
FIELDS = {"two processes": {"mesh.data": 2, "distributed.timeout": 600.0}}


def fields(subject: str) -> dict[str, Any]:
    """What a subject changes in its config."""
    return ({} if subject == "a sweep" else CONFIG) | FIELDS.get(subject, {})


def commands(subject: str, place: pathlib.Path) -> list[list[str]]:
    """The command of each process of a subject."""
    cache = {"compilation_cache": str((place.parent / "cache").resolve())}
    values = [f"--config.{k}={v}" for k, v in (fields(subject) | cache).items()]
    where, python = [*values, f"--workdir={place}"], [sys.executable, "-c", WITH_PARENT, "-m"]
    if subject == "a sweep":
        file = "--config=tests/tiny_sweep.py"
        return [[*python, "sapo_jax.sweep", file, "--most=3", *where]]
    command = [*python, "sapo_jax.main", "--config=tests/tiny_config.py", *where]
    if subject == "one process":
        return [command]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        both = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--processes=2"]
    return [[*command, *both, f"--process={i}"] for i in range(2)]


def start(subject: str, place: pathlib.Path) -> list[subprocess.Popen]:
    """The processes of a subject; what they say is in <place>.log."""
    with open(place.with_suffix(".log"), "ab") as log:
        options = {"cwd": ROOT, "stdout": log, "stderr": log}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiled faster
        return [
            subprocess.Popen(command, env=environment, **options)
            for command in commands(subject, place)
        ]


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Their statuses when all have ended, or the time is over; None of those that go on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.01)
    return [process.poll() for process in processes]


def kill(processes: list[subprocess.Popen], seconds: float, apart: float) -> bool:
    """SIGKILL after some seconds, to several at some distance; False if they had ended before."""
    if None not in wait(processes, seconds):
        return False
    for process in processes:
        process.kill()
        time.sleep(apart if process is not processes[-1] else 0)
    for process in processes:
        process.wait()
    return True


def _runs(subject: str, place: pathlib.Path) -> list[tuple[pathlib.Path, settings.Settings]]:
    """Directory and settings of each run of a subject."""
    if subject == "a sweep":
        parts = cohorts.make(tiny_sweep.get_config(), tiny_sweep.get_sweep(), most=3)
        return [
            (place / f"cohort-{i:03d}" / name, run)
            for i, part in enumerate(parts)
            for name, run in zip(part.names, part.runs, strict=True)
        ]
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields(subject) | {"mesh.data": 1})
    return [(place, settings.from_config(config))]


def ends(subject: str, place: pathlib.Path) -> dict[str, str]:
    """What a subject has left, as a digest of each part of each run."""

    def hashed(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    found = {}
    for path, checked in _runs(subject, place):
        state, meta = final_state(path, checked)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {jax.tree_util.keystr(k): np.asarray(x).tobytes().hex() for k, x in leaves}
        parts = {"metrics": records(path), "samples": digest(path), "state": arrays, "meta": meta}
        name = path.name if subject == "a sweep" else ""
        found |= {f"{name} {part}".strip(): hashed(value) for part, value in parts.items()}
    half = ("*.tmp", "*.orbax-checkpoint-tmp*")
    left = sorted(str(path.relative_to(place)) for name in half for path in place.rglob(name))
    return found | {"left over": ", ".join(left)}


def done(place: pathlib.Path) -> int:
    """Iterations that stand in the metrics, of all runs."""
    paths = [p.parent for p in place.rglob("metrics")]
    return sum(max((r["iteration"] for r in read_metrics(p)), default=0) for p in paths)


class Storm:
    """What has happened so far, in storm.jsonl."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.file = workdir, workdir / "storm.jsonl"
        self.lock = threading.Lock()  # subjects have a thread each
        if workdir.exists() and any(workdir.iterdir()) and not self.file.exists():
            raise ValueError(f"--workdir={workdir}: holds other files; must be new")
        workdir.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text() if self.file.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut
        self.events = [json.loads(line) for line in whole.splitlines()]
        self.file.write_text(whole)

    def add(self, subject: str, **event: Any) -> dict:
        """Write an event down."""
        event = {"subject": subject, **event}
        with self.lock, self.file.open("a") as file:
            self.events.append(event)
            file.write(json.dumps(event) + "\n")
        return event

    def of(self, subject: str, what: str) -> list[dict]:
        """The events of a kind."""
        return [e for e in self.events if e["subject"] == subject and e["what"] == what]

    def undisturbed(self, subject: str) -> dict:
        """The event of the run that nobody kills."""
        if found := self.of(subject, "undisturbed"):
            return found[0]
        place = self.workdir / f"{subject} undisturbed".replace(" ", "-")
        for _ in range(2):  # the second time with compiled programs, as those that are killed
            shutil.rmtree(place, ignore_errors=True)
            begin = time.monotonic()
            statuses = wait(start(subject, place), 900)
            if set(statuses) != {0}:
                raise RuntimeError(f"{subject}: {statuses}, see {place}.log")
        seconds = time.monotonic() - begin
        with READING:
            left = ends(subject, place)
        return self.add(subject, what="undisturbed", seconds=seconds, ends=left)

    def next(self, subject: str, last: bool) -> None:
        """Start, or start again; kill, unless it is the last time; compare what is complete."""
        whole = self.undisturbed(subject)
        tries = len(self.of(subject, "killed")) + len(self.of(subject, "complete"))
        lives = len(self.of(subject, "complete"))
        rng = np.random.default_rng([FLAGS.seed, *subject.encode(), tries])
        moment, apart = rng.uniform(0, whole["seconds"]), rng.uniform(0, 1)
        place = self.workdir / f"{subject} {lives}".replace(" ", "-")
        before, processes = done(place) if place.exists() else 0, start(subject, place)
        if not last and kill(processes, moment, apart):
            now = done(place) if place.exists() else 0
            self.add(subject, what="killed", life=lives, moment=moment, before=before, now=now)
            return
        statuses = wait(processes, PATIENCE * whole["seconds"])
        differ = ["hangs"] if None in statuses else [f"status {s}" for s in statuses if s]
        for process in processes:
            process.kill()
        if not differ:
            with READING:
                found = ends(subject, place)
            differ = [part for part, value in whole["ends"].items() if found.get(part) != value]
        self.add(subject, what="complete", life=lives, differ=differ)
        if not differ:
            shutil.rmtree(place)


def table(storm: Storm) -> str:
    """The storm in Markdown."""
    columns = "", "kills", "before any iteration", "runs", "bit for bit"
    lines = [columns, ("---",) * len(columns)]
    for subject in SHARES:
        kills, lives = storm.of(subject, "killed"), storm.of(subject, "complete")
        early = sum(event["now"] <= event["before"] for event in kills)
        same = sum(not event["differ"] for event in lives)
        lines.append((subject, len(kills), f"{early} of the starts", len(lives), same))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def besiege(storm: Storm, subject: str, kills: int) -> None:
    """Kill a subject as often, then let it end."""
    begin = time.monotonic()
    while (count := len(storm.of(subject, "killed"))) < kills:
        storm.next(subject, last=False)
        seconds = time.monotonic() - begin
        print(f"{seconds:4.0f} s, {subject}: {count} of {kills} kills", flush=True)
    events = [event["what"] for event in storm.events if event["subject"] == subject]
    if events[-1:] == ["killed"]:
        storm.next(subject, last=True)


def main(given: cli.Flags) -> None:
    """Kill as often as the flags say, then let all end."""
    logging.set_verbosity(logging.WARNING)
    storm, total = Storm(pathlib.Path(given.workdir)), sum(SHARES.values())
    kills = {s: round(given.kills * share / total) for s, share in SHARES.items()}
    kills["one process"] += given.kills - sum(kills.values())
    with futures.ThreadPoolExecutor() as threads:
        for each in [threads.submit(besiege, storm, s, count) for s, count in kills.items()]:
            each.result()
    text = table(storm)
    print(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "table.md").write_text(text + "\n")
    shutil.copy(storm.file, HERE / "results" / "storm.jsonl")
    sys.exit(any(e["differ"] for e in storm.events if e["what"] == "complete"))


if __name__ == "__main__":
    cli.run(main, FLAGS)
