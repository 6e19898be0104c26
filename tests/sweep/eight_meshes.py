"""Runs side by side on a mesh against each alone; run by `test_mesh` in a process of 8 devices."""

from functools import partial

import jax
import numpy as np
import pytest

from sapo_jax import axes, train
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import settings
from sapo_jax.training.workdir import read_samples
from tests import tiny_sweep
from tests.sweep.test_population import Bar
from tests.test_train import final_state, records

RUNS = axes.zip_(axes.axis("seed", 3, 4), axes.axis("objective.tau_neg", 1.05, 2.0))
FIELDS = {
    "iterations": 3, "eval.every": 3, "checkpoint.every": 1, "log.samples_every": 1,
    "sampler.slots": 4, "sampler.max_new_tokens": 24, "learner.eps": 1e-5,
    "mesh.fsdp": 2, "mesh.tensor": 2,
}  # fmt: skip


def cohort_of(**fields):
    (cohort,) = cohorts.make(tiny_sweep.get_config(**{**FIELDS, "mesh.run": 2, **fields}), RUNS)
    assert cohort.method == "mesh"
    return cohort


def alone(override, **fields):
    """A run on the first part of the devices."""
    config = tiny_sweep.get_config(**{**FIELDS, **fields, **override})
    return settings.from_config(config, devices=jax.devices()[:4])


def same(got, expected):
    for one, other in zip(*map(records, (got, expected)), strict=True):
        assert one.keys() == other.keys()
        for record in (one, other):
            for key in [k for k in record if k.startswith("histogram/")]:
                del record[key]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), one, other)


def test_runs_side_by_side_are_each_alone(tmp_path):
    cohort = cohort_of()
    schedule.run_cohort(cohort, tmp_path / "all", Bar())
    for name, override, run in zip(cohort.names, cohort.overrides, cohort.runs, strict=True):
        checked = alone(override)
        train.run(checked, tmp_path / name)
        both = tmp_path / "all" / name, tmp_path / name
        same(*both)
        for i in range(1, 4):
            rows = [read_samples(place, i) for place in both]
            assert [row["completion"] for row in rows[0]] == [row["completion"] for row in rows[1]]
        got, expected = (final_state(place, one)[0] for place, one in zip(both, (run, checked)))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got.params, expected.params)
