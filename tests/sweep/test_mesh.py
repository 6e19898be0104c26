"""Runs of a sweep that have several devices each: on eight devices, and in two processes."""

import json
import signal
from functools import partial

import jax
import numpy as np
import pytest

from sapo_jax import axes, train
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import settings
from tests import fakes, tiny_sweep
from tests.parallel.test_processes import both
from tests.sweep import mesh_processes
from tests.sweep.eight_meshes import comparable
from tests.sweep.test_population import Bar
from tests.test_train import digest, records

pytestmark = pytest.mark.usefixtures("no_plots")
PROCESSES = "tests.sweep.mesh_processes"


def test_runs_on_a_mesh_of_eight_devices():
    """`eight_meshes.py`, in a process whose CPU counts as eight devices."""
    fakes.on_eight_devices("tests/sweep/eight_meshes.py")


@pytest.mark.slow
def test_more_runs_on_a_mesh_of_eight_devices():
    fakes.on_eight_devices("tests/sweep/eight_meshes.py", "-m", "slow")


@pytest.mark.slow
def test_a_sweep_of_two_processes_resumes_where_one_was_killed(tmp_path):
    """Bit for bit, over two cohorts, the second with a place to spare; and each run is that alone.

    A process that takes another branch, or writes what the first one writes, stops them both.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    statuses, messages = both(whole, "", PROCESSES)
    assert statuses == [0, 0], messages
    statuses, messages = both(killed, "dies", PROCESSES)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0
    assert not (killed / "cohort-000" / "done.json").exists(), messages
    statuses, messages = both(killed, "", PROCESSES)
    assert statuses == [0, 0], messages
    runs = json.loads((whole / "manifest.json").read_text())["runs"]
    assert [run["directory"].partition("/")[0] for run in runs] == [
        "cohort-000",
        *["cohort-001"] * 2,
    ]
    for run in runs:
        one, other = whole / run["directory"], killed / run["directory"]
        assert records(one) == records(other)
        assert digest(one) == digest(other)
        config = tiny_sweep.get_config(**mesh_processes.FIELDS, **run["overrides"])
        alone = tmp_path / run["name"]
        train.run(settings.from_config(config), alone)
        found, expected = ([comparable(r) for r in records(place)] for place in (one, alone))
        for record in (*found, *expected):  # how rows and weights lie on four devices and on one
            for key in ("sampler/rows_per_token", "sampler/weights_moved_bytes"):
                record.pop(key, None)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.slow
def test_runs_of_a_mesh_of_one_place_train_alone(tmp_path):
    """One after the other, each in its directory, where the same settings by `main` go on."""
    fields = {"iterations": 1, "eval.every": 0, "mesh.data": -1, "sampler.slots": 4}
    parts = cohorts.make(tiny_sweep.get_config(**fields), axes.axis("seed", 1, 2))
    assert [(part.method, len(part.runs)) for part in parts] == [("mesh", 1)] * 2
    schedule.run_cohort(parts[0], tmp_path, Bar())
    place = tmp_path / parts[0].names[0]
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["1"]
    train.run(parts[0].lead, place)


def test_as_many_runs_train_together_as_the_mesh_has_places():
    with pytest.raises(ValueError, match=r"mesh: run=2.*does not match the number of devices, 1"):
        cohorts.make(tiny_sweep.get_config(**{"mesh.run": 2}), axes.axis("seed", 1, 2))
    config = tiny_sweep.get_config(**{"mesh.data": -1, "population.method": "vmap"})
    with pytest.raises(ValueError, match=r"population.method='vmap': must be 'auto' with a config"):
        cohorts.make(config, axes.axis("seed", 1, 2))
