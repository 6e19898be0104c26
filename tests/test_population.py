"""Populations: a run among others is the run alone, nothing compiles twice, resume, grouping."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import (
    axes,
    cohort_run,
    cohorts,
    data,
    decoding,
    experience,
    learner,
    objectives,
    population,
    rundir,
    sampling,
    settings,
    train,
)
from sapo_jax.model import params
from sapo_jax.population import pick, stack
from tests import fakes, tiny_config
from tests.test_train import digest, final_state, records

# Rewards that differ within a group, so that there is something to learn: the shorter, the better.
SHORT = {"reward.overlong": 1.0, "reward.buffer": 40, "reward.max_length": 40}
RUNS = axes.zip_(
    axes.axis("seed", 3, 4, 5),
    axes.axis("objective.tau_neg", 1.05, 1.0, 2.0),
    axes.axis("learner.learning_rate", 1e-3, 3e-3, 1e-2),
)


def base(**fields):
    config = tiny_config.get_config()
    fixed = {"sampler.slots": 0, "sampler.max_new_tokens": 40, "batch.oversample": 2, **SHORT}
    times = {"iterations": 10, "eval.every": 5, "checkpoint.every": 5, "log.samples_every": 5}
    config.update_from_flattened_dict({**fixed, **times, **fields})
    return config


class Bar:
    """Counts what a progress bar would show."""

    def __init__(self):
        self.steps, self.notes, self.shown = 0, [], []

    def step(self, count):
        self.steps += count

    def note(self, text):
        self.notes.append(text)

    def show(self, record):
        self.shown.append(record)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A population of three for 10 iterations, and what was compiled after its start."""
    workdir = tmp_path_factory.mktemp("together")
    (cohort,) = cohorts.resolve(base(), RUNS)
    counter, warm_up = fakes.Compilations(), cohort_run._warm_up

    def counted(*arguments):
        warm_up(*arguments)
        counter.__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort_run, "_warm_up", counted)
        bar = Bar()
        assert cohort_run.run(cohort, workdir, bar)
        counter.__exit__()
    return workdir, cohort, bar, counter.count


@pytest.fixture(scope="module")
def alone(together, tmp_path_factory):
    """The second run of the population, by itself."""
    workdir, checked = tmp_path_factory.mktemp("alone") / "run", together[1].runs[1]
    train.run(checked, workdir)
    return workdir


def test_a_run_of_a_map_is_bitwise_the_run_alone(together, alone):
    """Over 10 iterations with dynamic sampling: metrics, samples, last checkpoint.

    A fusion across the loop over the runs, the noise or data order of another run, a learning rate
    that all share: each shows in the first update at the latest.
    """
    workdir, cohort, _, _ = together
    assert cohort.method == "map"
    among, checked = workdir / cohort.names[1], cohort.runs[1]
    found, expected = records(among), records(alone)
    assert len(found) == 11
    assert found == expected
    assert all(r["grad/norm"] > 0 for r in found[1:])
    assert digest(among) == digest(alone)
    (state, meta), (wanted, wanted_meta) = (final_state(w, checked) for w in (among, alone))
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert meta == wanted_meta
    assert sorted(p.name for p in among.iterdir()) == sorted(
        p.name for p in alone.iterdir() if p.name != ".lock"
    )


def test_nothing_compiles_after_the_start(together):
    assert together[3] == 0


def test_every_run_has_its_own_values(together):
    """Runs of other seeds and learning rates differ, from the first iteration on."""
    workdir, cohort, bar, _ = together
    first = [rundir.read_metrics(workdir / name)[1] for name in cohort.names]
    assert len({r["policy/loss"] for r in first}) == 3
    rates = [r["learning_rate"] for r in first]
    np.testing.assert_allclose(rates, [1e-3, 3e-3, 1e-2], rtol=1e-6)
    assert bar.steps == 30
    means = [r["reward/mean"] for r in (rundir.read_metrics(workdir / n)[-1] for n in cohort.names)]
    assert bar.shown[-1]["reward/mean"] == pytest.approx(np.mean(means))


def test_a_population_goes_on_where_it_stopped(together, tmp_path):
    """5 iterations, then again for 10: one checkpoint holds parameters and positions of all."""
    (short,) = cohorts.resolve(base(iterations=5), RUNS)
    assert cohort_run.run(short, tmp_path, Bar())
    whole, cohort, _, _ = together
    bar = Bar()
    assert cohort_run.run(cohort, tmp_path, bar)
    assert bar.steps == 30
    for name in cohort.names:
        assert records(tmp_path / name) == records(whole / name)
    state, wanted = (final_state(w / cohort.names[2], cohort.runs[2])[0] for w in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_directory_of_another_population_is_refused(together):
    workdir, cohort, _, _ = together
    (other,) = cohorts.resolve(base(**{"advantages": "mean"}), RUNS)
    with pytest.raises(ValueError, match="advantages: stored 'group', given 'mean'"):
        cohort_run.run(other, workdir, Bar())
    assert other.names == cohort.names
