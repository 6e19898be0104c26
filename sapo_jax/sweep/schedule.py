"""The cohorts of a sweep one after the other, in a directory that knows what is done."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

import jax
from etils import epath

from sapo_jax import cli, train
from sapo_jax.parallel import distributed, sharding
from sapo_jax.sweep.cohorts import Cohort
from sapo_jax.sweep.mesh import MeshPopulation
from sapo_jax.sweep.population import Population
from sapo_jax.training.engine import Streamed
from sapo_jax.training.files import check_directory, read_json, write_json
from sapo_jax.training.progress import Progress
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import gaps, read_metrics

MANIFEST, DONE = "manifest.json", "done.json"


def folder(index: int) -> str:
    """The directory of a cohort in that of the sweep."""
    return f"cohort-{index:03d}"


def manifest_of(parts: Sequence[Cohort]) -> dict:
    """Every run of a sweep with its directory, as JSON holds it."""
    runs = [
        {"name": name, "directory": f"{folder(i)}/{name}", "overrides": dict(override)}
        for i, part in enumerate(parts)
        for name, override in zip(part.names, part.overrides, strict=True)
    ]
    return json.loads(json.dumps({"runs": runs}))


def is_sweep(workdir: epath.Path) -> bool:
    """Whether a directory is of a sweep: by its manifest, or since it holds cohorts alone."""
    stored = read_json(workdir / MANIFEST)
    if stored is None:
        return all(re.fullmatch(r"cohort-\d+", path.name) for path in workdir.iterdir())
    runs = stored.get("runs") if isinstance(stored, dict) else None
    known = isinstance(runs, list) and all(isinstance(run, dict) for run in runs)
    return known and all("directory" in run for run in runs)


def check_manifest(workdir: epath.Path, manifest: dict) -> None:
    """Store the manifest, or refuse another sweep than the one that the directory is of.

    Raises:
      ValueError: the directory holds files and is of no sweep, or the stored manifest has other
        runs, or runs in other cohorts.
    """
    check_directory(workdir, "--workdir=", is_sweep, f"a sweep's, with its {MANIFEST}")
    path = workdir / MANIFEST
    if not path.exists():
        write_json(path, manifest)
    distributed.any_process(False)  # stored before any of them looks
    stored = read_json(path, {"runs": [{"directory": str}]})
    if stored != manifest:
        old, new = ([r["directory"] for r in m["runs"]] for m in (stored, manifest))
        strange = [name for name in new if name not in old] or [n for n in old if n not in new]
        raise ValueError(
            f"{workdir} is of another sweep: it has {len(old)} runs, given are {len(new)}, and "
            f"{strange[:1]} is in one of them only; give another --workdir, or the config, "
            "--axis and --most that it was started with"
        )


def _is_done(part: Cohort, place: epath.Path) -> bool:
    done = read_json(place / DONE) or {}
    return done.get("iterations") == part.lead.config.iterations


def _is_whole(run: Settings, place: epath.Path) -> bool:
    """Whether the directory of a run that has ended has every iteration.

    Its checkpoints may have been deleted altogether, but not end too early.
    """
    total, saved = run.config.iterations, place / "checkpoints"
    ended = (saved / str(total)).exists() or not saved.exists()
    return ended and not gaps(read_metrics(place), 1, total)


def _ended(part: Cohort, place: epath.Path) -> list[tuple[Settings, epath.Path]]:
    """The runs of a cohort that has ended with all of their iterations, and their directories."""
    each, stopped = zip(part.runs, part.names, strict=True), _stopped(place)
    return [(run, place / name) for run, name in each if name not in stopped]


def _repeat(run: Settings, place: epath.Path, bar: Progress) -> None:
    """Train a run again, alone, whose directory was deleted."""
    if (place / "checkpoints" / str(run.config.iterations)).exists():
        (place / "checkpoints").rmtree()  # it would end at once, without what was lost
    _alone(run, place, bar)


def _alone(run: Settings, place: epath.Path, bar: Progress) -> None:
    """Train a run by itself; on a mesh of several places it is the only one there."""
    if sharding.runs(run.mesh) == 1:
        train.run_all([Streamed(run)], place, [place], bar)
        return
    again = place.with_name(f"{place.name}-again")  # the checkpoints on the way are of all places
    train.run_all([MeshPopulation([run])], again, [place], bar)
    if jax.process_index() == 0:
        again.rmtree()


def _how(part: Cohort) -> str:
    if part.method == "mesh":
        return f"mesh ({sharding.describe(part.lead.mesh.shape)})"
    if part.method != "devices":
        return part.method
    used, all_of_them = sharding.run_mesh(len(part.runs)).size, jax.local_device_count()
    return f"devices ({used} of {all_of_them}, as many as divide the runs)"


def run_cohort(cohort: Cohort, workdir: epath.Path, bar: Progress) -> None:
    """Train, or go on training, the runs of a cohort in the directories ``<workdir>/<name>``.

    These hold what a run alone leaves, its last checkpoint included: any of them can be evaluated,
    exported, or be what another run starts from. See `train.run_all`.
    """
    if cohort.method == "mesh" and sharding.runs(cohort.lead.mesh) == 1:
        _alone(cohort.lead, workdir / cohort.names[0], bar)
        return
    if cohort.method == "map":
        engines = [Streamed(run) for run in cohort.runs]
    elif cohort.method == "mesh":
        engines = [MeshPopulation(cohort.runs)]
    else:
        engines = [Population(cohort.runs, cohort.method)]
    train.run_all(engines, workdir, [workdir / name for name in cohort.names], bar)


def run(parts: Sequence[Cohort], workdir: epath.PathLike, *, job: tuple[int, int] = (0, 1)) -> bool:
    """Train what is left of a sweep; killed at any moment, the same call goes on with it.

    Args:
      parts: from `cohorts.make`.
      workdir: of the sweep; ``<workdir>/cohort-000/<name>`` is the directory of a run.
      job: (i, n): every n-th cohort from the i-th on; the jobs share the directory.

    Returns:
      Whether every run of the sweep is complete, those of other jobs included.

    Raises:
      ValueError: the directory is of another sweep.
      RuntimeError: another process works on the same cohort.
    """
    workdir, (index, count) = epath.Path(workdir), job
    check_manifest(workdir, manifest_of(parts))
    places = [workdir / folder(i) for i in range(len(parts))]
    mine = list(zip(parts, places, strict=True))[index::count]
    iterations = sum(len(part.runs) * part.lead.config.iterations for part, _ in mine)
    with Progress(iterations, workdir.name) as bar:
        for part, place in mine:
            _finish(part, place, bar)
    every = zip(parts, places, strict=True)
    whole = (_is_done(*each) and all(_is_whole(*one) for one in _ended(*each)) for each in every)
    return distributed.first_says(all(whole))


def _finish(part: Cohort, place: epath.Path, bar: Progress) -> None:
    """Train what is left of a cohort; of several processes, the first one says what that is."""
    ended, iterations = distributed.first_says(_is_done(part, place)), part.lead.config.iterations
    if not ended:
        bar.line(f"{place.name}: {cli.several(len(part.runs), 'run')}, by {_how(part)}")
        start, record = time.time(), {"iterations": iterations, "method": part.method}
        try:
            run_cohort(part, place, bar)
        except train.NotFiniteError as error:
            record["stopped"] = error.stopped
        write_json(place / DONE, record | {"seconds": time.time() - start})
    lost = [one for one in _ended(part, place) if distributed.first_says(not _is_whole(*one))]
    bar.skip((len(part.runs) - len(lost)) * iterations * ended)
    for run, directory in lost:
        bar.line(f"{place.name}/{directory.name}: records are missing, it runs again, alone")
        _repeat(run, directory, bar)


def _stopped(place: epath.Path) -> dict[str, str]:
    """The runs of a cohort that has ended that stopped before their end, and why."""
    return (read_json(place / DONE) or {}).get("stopped", {})


def stopped(parts: Sequence[Cohort], workdir: epath.PathLike) -> str:
    """Which runs of a sweep stopped before their end, and why; "" where none did."""
    every = [_stopped(epath.Path(workdir) / folder(i)) for i in range(len(parts))]
    return "; ".join(f"{name}: {why}" for found in every for name, why in found.items())
