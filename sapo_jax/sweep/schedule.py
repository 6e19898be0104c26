"""The cohorts of a sweep one after the other, in a directory that knows what is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import jax
from etils import epath

from sapo_jax import train
from sapo_jax.parallel import sharding
from sapo_jax.sweep.cohorts import Cohort
from sapo_jax.sweep.population import Population
from sapo_jax.training.engine import Streamed
from sapo_jax.training.files import check_directory, read_json, write_json
from sapo_jax.training.progress import Progress

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
    """Whether a directory is of a sweep."""
    stored = read_json(workdir / MANIFEST)
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
    stored = read_json(path)
    if stored != manifest:
        old, new = ([r["directory"] for r in m["runs"]] for m in (stored, manifest))
        strange = [name for name in new if name not in old] or [n for n in old if n not in new]
        raise ValueError(
            f"{workdir} is of another sweep: it has {len(old)} runs, given are {len(new)}, and "
            f"{strange[:1]} is in one of them only; give another --workdir, or the config and "
            "--most that it was started with"
        )


def _is_done(part: Cohort, place: epath.Path) -> bool:
    done = read_json(place / DONE) or {}
    return done.get("iterations") == part.lead.config.iterations


def _how(part: Cohort) -> str:
    if part.method != "devices":
        return part.method
    used, all_of_them = sharding.run_mesh(len(part.runs)).size, jax.local_device_count()
    return f"devices ({used} of {all_of_them}, as many as divide the runs)"


def run_cohort(cohort: Cohort, workdir: epath.Path, bar: Progress) -> bool:
    """Train, or go on training, the runs of a cohort in the directories ``<workdir>/<name>``.

    These hold what a run alone leaves, its last checkpoint included: any of them can be evaluated,
    exported, or be what another run starts from. See `train.run_all`.
    """
    if cohort.method == "map":
        engines = [Streamed(run) for run in cohort.runs]
    else:
        engines = [Population(cohort.runs, cohort.method)]
    return train.run_all(engines, workdir, [workdir / name for name in cohort.names], bar)


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
    sizes = [len(part.runs) * part.lead.config.iterations for part, _ in mine]
    done = [_is_done(*each) for each in mine]
    with Progress(sum(sizes), workdir.name) as bar:
        bar.skip(sum(size for size, ended in zip(sizes, done, strict=True) if ended))
        for (part, place), ended in zip(mine, done, strict=True):
            if ended:
                continue
            bar.line(f"{place.name}: {len(part.runs)} runs, by {_how(part)}")
            start = time.time()
            if not run_cohort(part, place, bar):
                break
            record = {"iterations": part.lead.config.iterations, "method": part.method}
            write_json(place / DONE, record | {"seconds": time.time() - start})
    return all(_is_done(*each) for each in zip(parts, places, strict=True))
