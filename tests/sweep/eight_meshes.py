"""Runs side by side on a mesh against each alone; run by `test_mesh` in a process of 8 devices."""

import re
from functools import partial

import jax
import numpy as np
import pytest

from sapo_jax import axes, learner, sampler, train
from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.preflight import places, programs
from sapo_jax.sweep import cohorts, mesh, schedule
from sapo_jax.training import checkpoint, settings, startup
from sapo_jax.training.engine import stack
from sapo_jax.training.workdir import read_samples
from tests import fakes, tiny_sweep
from tests.parallel.two_processes import SEES
from tests.sweep.test_population import Bar, KilledError, kill
from tests.test_train import digest, records

RUNS = axes.zip_(axes.axis("seed", 3, 4), axes.axis("objective.tau_neg", 1.05, 2.0))
FIELDS = {
    "iterations": 3, "eval.every": 3, "checkpoint.every": 1, "log.samples_every": 1,
    "model.num_hidden_layers": 1, "sampler.slots": 4, "sampler.max_new_tokens": 16,
    "learner.eps": 1e-5,  # Adam's own would magnify the last bits of gradients of 1e-8
    "mesh.fsdp": 2, "mesh.tensor": 2,
}  # fmt: skip
OWN_MESH = {
    "mesh.data": 2, "mesh.tensor": 1, "sampler.mesh.tensor": 2, "sampler.mesh.data": 2,
}  # fmt: skip
EVALS = {"few": {"samples": 2, "prompts": 4}, "greedy": {"samples": 1, "temperature": 0.0}}


def cohorts_of(runs=RUNS, **fields):
    found = cohorts.make(tiny_sweep.get_config(**{**FIELDS, "mesh.run": 2, **fields}), runs)
    assert {cohort.method for cohort in found} == {"mesh"}
    return found


def alone(override, fields, workdir):
    """The run on the first part of the devices, and its settings."""
    config = tiny_sweep.get_config(**{**FIELDS, **fields, **override})
    own = config.mesh.data * config.mesh.fsdp * config.mesh.expert * config.mesh.tensor
    checked = settings.from_config(config, devices=jax.devices()[:own])
    train.run(checked, workdir)
    return checked


def final_state(workdir, checked):
    """As a run alone restores it on its own mesh."""
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        state, meta = checkpoints.restore(checkpoints.latest(), learner.abstract(checked.hp))
    return jax.device_get(state), meta


def comparable(record):
    """Without what the last bits decide: whether r < 1 where r = 1, and the bin of a histogram that
    a ratio is in, with the quantiles that are read off it."""
    found = {k: v for k, v in record.items() if not k.startswith("histogram/")}
    minibatches = found.get("minibatch", [])
    for own in (found, *minibatches):
        for key in [k for k in own if re.fullmatch(r"ratio/.*_p\d\d", k)]:
            del own[key]
    for first in minibatches[:1]:
        for key in [k for k in first if k.startswith(("coefficient/", "ratio/bound_broken"))]:
            del first[key]
    return found


def check_alone(cohort, directory, fields):
    """Each run against itself alone: metrics, samples, the last state, to what XLA rounds."""
    for name, override, run in zip(cohort.names, cohort.overrides, cohort.runs, strict=True):
        both = directory / name, directory / f"{name} alone"
        checked = alone(override, fields, both[1])
        found, expected = ([comparable(r) for r in records(place)] for place in both)
        assert len(found) == 4
        assert found[-1]["grad/norm"] > 0
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
        for i in range(1, 4):
            one, other = ([r["completion"] for r in read_samples(p, i)] for p in both)
            assert one == other
        states = [final_state(place, c) for place, c in zip(both, (run, checked), strict=True)]
        (got, meta), (wanted, wanted_meta) = states
        assert meta == wanted_meta
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got.params, wanted.params
        )


@pytest.mark.slow
def test_runs_side_by_side_are_each_alone(tmp_path, monkeypatch):
    """By one executable of all, none of it compiled after the start.

    A sum over both runs, or one's prompts, noise or verdicts for the other, shows in all of them.
    """
    (cohort,), late, warm_up = cohorts_of(), fakes.Compilations(), startup.warm_up

    def counted(*arguments):
        warm_up(*arguments)
        late.__enter__()

    monkeypatch.setattr(startup, "warm_up", counted)
    with fakes.Compilations() as compiled:
        schedule.run_cohort(cohort, tmp_path, Bar())
        late.__exit__()
    for program in ("fill_slots", "convert_joined", "select_rows", "make_minibatches", "update"):
        assert compiled.names[program] == 1, compiled.names
    # Orbax slices what lies on several devices; at the end each run is taken out of them all.
    assert {n for n in late.names if late.names[n]} <= {"slice", "<lambda>"}, late.names
    monkeypatch.undo()
    check_alone(cohort, tmp_path, {})


def test_a_budget_of_runs_side_by_side_is_refused():
    """Before any compile, in preflight and in a sweep alike."""
    fields = {"sampler.budget": 4096, "staleness": 1}
    message = r"config.sampler.budget=4096: must be 0, whole rollouts, with mesh.run=2: runs side"
    with fakes.Compilations() as compiled:
        with pytest.raises(ValueError, match=message):
            settings.from_config(tiny_sweep.get_config(**FIELDS, **fields, **{"mesh.run": 2}))
        with pytest.raises(ValueError, match=rf"the run .*: {message}"):
            cohorts_of(**fields)
    assert compiled.count == 0


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_runs_side_by_side_go_on_where_they_stopped(staleness, tmp_path):
    """Bit for bit: one checkpoint holds the states, positions and waiting batches of all."""
    (cohort,) = cohorts_of(staleness=staleness)
    schedule.run_cohort(cohort, tmp_path, Bar())
    for _ in range(2):  # within the second iteration, and one iteration later
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, train, "write_samples", 3)
            with pytest.raises(KilledError):
                schedule.run_cohort(cohort, tmp_path / "again", Bar())
    schedule.run_cohort(cohort, tmp_path / "again", Bar())
    for name, run in zip(cohort.names, cohort.runs, strict=True):
        got, expected = tmp_path / "again" / name, tmp_path / name
        assert records(got) == records(expected)
        assert digest(got) == digest(expected)
        states = final_state(got, run), final_state(expected, run)
        jax.tree.map(np.testing.assert_array_equal, *states)  # and the positions


SPARSE = {"model.preset": "nano_moe", "model.num_hidden_layers": 2}
OTHERS = {
    "moe": (SPARSE, RUNS),
    "moe, experts apart, routing replayed": (
        SPARSE | {"mesh.tensor": 1, "mesh.expert": 2, "learner.routing_replay": "R2",
                  "learner.old_logp": "recompute"},
        RUNS,
    ),
    "adapters, evaluations, another mesh to sample": (
        OWN_MESH | {"lora.rank": 2, "evals": EVALS},
        axes.zip_(axes.axis("seed", 3, 4), axes.axis("lora.alpha", 16.0, 64.0)),
    ),
    "batches that wait": ({"staleness": 1}, RUNS),
    "pictures, a frozen tower": (SEES | {"model.train_vision": False}, RUNS),
    "pictures, a tower that learns": (SEES, RUNS),
    "a place that is free, objectives of two kinds": (
        {"mesh.run": 4, "mesh.tensor": 1},
        axes.zip_(axes.axis("objective.name", "sapo", "grpo", "gspo"), axes.axis("seed", 1, 2, 3)),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_others_side_by_side_are_each_alone(case, tmp_path):
    fields, runs = OTHERS[case]
    (cohort,) = cohorts_of(runs, **fields)
    schedule.run_cohort(cohort, tmp_path, Bar())
    check_alone(cohort, tmp_path, {k: v for k, v in fields.items() if k != "mesh.run"})


def test_parameters_of_runs_side_by_side_lie_on_the_samplers_mesh_as_its_table_says():
    (cohort,) = cohorts_of(**OWN_MESH)
    population, run = mesh.MeshPopulation(cohort.runs), cohort.lead
    each = [params.init(run.model, seed) for seed in range(2)]
    whole = jax.device_put(
        stack(each), sharding.shardings(run.mesh, sharding.by_run(
            params.partition_specs(run.model), run.mesh))
    )  # fmt: skip
    found = population.to_sampler(whole)
    expected = programs.abstract_sampler(run, run.sampler_mesh)
    same = jax.tree.map(
        lambda x, e: x.sharding.is_equivalent_to(e.sharding, x.ndim), found, expected
    )
    assert jax.tree.all(same), same
    alone = [sampler.to_sampler(one, run.model) for one in each]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), stack(alone))


@pytest.mark.parametrize(
    "fields", [OWN_MESH, *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, SEES))]
)
def test_preflight_knows_the_programs_of_runs_side_by_side(fields):
    """A chip holds what it would hold for a run alone on as many; the programs can be traced."""
    (cohort,) = cohorts_of(**fields)
    override = cohort.overrides[0]
    config = tiny_sweep.get_config(**{**FIELDS, **fields, **override})
    checked = settings.from_config(config, devices=jax.devices()[:4])
    found, expected = (programs.programs(run) for run in (cohort.lead, checked))
    assert list(found) == list(expected)
    for name, program in found.items():
        sizes = [programs.bytes_per_chip(p.arguments) for p in (program, expected[name])]
        assert sizes[0] == sizes[1] > 0, name
        assert program.lower().out_info is not None


def test_preflight_tries_the_most_runs_first():
    (cohort,) = cohorts_of()
    found = list(places.shapes(cohort.lead, 8))
    assert [fields["mesh.run"] for fields in found] == [8, 4, 2, 1]
    for fields in found:
        own = 8 // fields["mesh.run"]
        assert fields["mesh.data"] * fields["mesh.fsdp"] * fields["mesh.tensor"] == own
