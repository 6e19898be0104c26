"""A population on eight devices against one; run by `test_population` in a process with eight."""

from functools import partial

import jax
import numpy as np
import pytest

from sapo_jax import axes
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.sweep import cohorts, population, rollouts, schedule
from tests import tiny_sweep
from tests.parallel.eight_devices import collectives
from tests.sweep.eight_meshes import comparable
from tests.sweep.test_population import Bar
from tests.test_train import final_state, records

RUNS = axes.product(axes.axis("objective.name", "sapo", "grpo"), axes.axis("seed", *range(6)))
FIELDS = {
    "eval.every": 1, "checkpoint.every": 1, "model.num_hidden_layers": 1,
    "sampler.max_new_tokens": 24,
    "learner.eps": 1e-5,  # Adam's own would magnify the last bits of gradients of 1e-8
}  # fmt: skip


class Compiled:
    """A jitted function that keeps its executables, and is strict: other shardings are an error."""

    def __init__(self, function):
        self.function, self.programs = function, {}

    def __call__(self, *arguments, **static):
        key = tuple(sorted(static.items()))
        if key not in self.programs:
            self.programs[key] = self.function.lower(*arguments, **static).compile()
        given = {name: static[name] for name in ("frozen",) if name in static}
        return self.programs[key](
            *(x for x in arguments if not isinstance(x, ModelConfig)), **given
        )


def cohort_of(method, iterations):
    fields = {**FIELDS, "iterations": iterations, "population.method": method}
    (cohort,) = cohorts.make(tiny_sweep.get_config(**fields), RUNS)
    return cohort


def same_histograms(got, expected):
    """Take them out of two records and compare how many values lie below each edge.

    Edges closer to log r = 0 or w = 1 than 1e-5, which the programs' last bits reach, are left out;
    near the others, in bins of a quarter of a decade, one value may lie on the other side.
    """
    for key in [k for k in expected if k.startswith("histogram/")]:
        one, other = got.pop(key), expected.pop(key)
        assert one["edges"] == other["edges"]
        below = np.cumsum([one["counts"], other["counts"]], -1)
        assert below[0, -1] == below[1, -1] > 0
        upper = np.array(one["edges"])[1:]
        far = np.minimum(np.abs(upper), np.abs(upper - 1)) > 1.1e-5
        assert far.sum() > len(far) / 2
        np.testing.assert_allclose(*below[:, far], rtol=0, atol=1)


def test_runs_on_devices_of_their_own_are_those_of_one_device(tmp_path, monkeypatch):
    """Two runs on each of six devices, stopped and resumed: as one device's, and apart.

    A sum over the devices, or a run computed with its neighbour's values, shows in both.
    """
    schedule.run_cohort(cohort_of("map", 2), tmp_path / "map", Bar())
    vmapped, programs = population.vmapped, {"rollout": Compiled(rollouts.rollout)}

    def strict(function, *arguments, **static):
        name = function.__name__
        return programs.setdefault(name, Compiled(vmapped(function, *arguments, **static)))

    monkeypatch.setattr(rollouts, "rollout", programs["rollout"])
    monkeypatch.setattr(population, "vmapped", strict)
    for iterations in (1, 2):
        on_all = cohort_of("devices", iterations)
        schedule.run_cohort(on_all, tmp_path / "devices", Bar())
    for name, checked in zip(on_all.names, on_all.runs, strict=True):
        both = [tmp_path / method / name for method in ("devices", "map")]
        for got, expected in zip(*map(records, both), strict=True):
            for record in (got, expected):  # alone, a run goes on with fewer and fewer rows
                record.pop("sampler/rows_per_token", None)
            same_histograms(got, expected)
            got, expected = map(comparable, (got, expected))
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-6), got, expected)
        got, expected = (final_state(place, checked)[0].params for place in both)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got, expected)
    assert {"rollout", "convert", "update", "finish_iteration"} <= set(programs)
    for program in programs.values():
        assert len(program.programs) == 1
        for compiled in program.programs.values():
            assert len(jax.tree.leaves(compiled.output_shardings)[0].device_set) == 6
            assert not any(collectives(compiled).values()), collectives(compiled)


def test_the_method_follows_from_the_runs_and_the_devices(monkeypatch):
    """As many devices as divide the runs; by itself none on a CPU: they would share its cores."""
    assert sharding.run_mesh(12).size == 6
    assert population.choose("devices", 12) == "devices"
    assert population.choose("auto", 16) == "map"
    with pytest.raises(ValueError, match=r"population.method='devices': 11 runs .* 8 device"):
        population.choose("devices", 11)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert population.choose("auto", 16) == "devices"
    assert population.choose("auto", 11) == "vmap"
