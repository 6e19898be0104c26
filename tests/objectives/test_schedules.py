"""Schedules: values by progress, exact where nothing changes, one program for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import objectives
from sapo_jax.objectives import SHAPES, Schedule
from tests import fakes

SHARES = {
    "constant": lambda p: 0 * p,
    "linear": lambda p: p,
    "cosine": lambda p: (1 - np.cos(np.pi * p)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_closed_form_by_iteration(shape):
    """From the first iteration's value to the last one's, and no further; the rest stays."""
    start = objectives.resolve("sapo", tau_neg=1.05)
    schedule = Schedule(objectives.resolve(start, tau_neg=3.0), SHAPES.index(shape), 11)
    p = np.clip(np.arange(13) / 10, 0, 1)
    expected = 1.05 + SHARES[shape](p) * (3.0 - 1.05)
    with jax.enable_x64(True):
        found = [schedule.at(start, jnp.int32(i)).hyperparameters for i in range(13)]
    on_host = [schedule.at(start, i, np).hyperparameters for i in range(13)]
    for each in (found, on_host):
        np.testing.assert_allclose([hp["tau_neg"] for hp in each], expected, rtol=1e-7)
        assert {float(hp["tau_pos"]) for hp in each} == {1.0}
    assert float(Schedule(schedule.end, 1, 1).at(start, 0, np).hyperparameters["tau_neg"]) == 1.05


def test_what_does_not_change_is_exact_and_may_be_infinite():
    """0.1 + share·0 is 0.1 in any precision; ∞ + share·(∞ − ∞) would be NaN."""
    start = objectives.resolve("grpo", eps_low=0.1)
    schedule = Schedule(objectives.resolve(start, eps_high=0.4), 2, 7)
    for i in range(7):
        found = jax.jit(schedule.at)(start, i).hyperparameters
        assert found["eps_low"] == np.float32(0.1)
        assert found["dual_clip"] == np.inf


def test_schedules_of_a_switch_share_a_program():
    """A population: members, shapes, ends and lengths differ, nothing compiles again."""
    both = objectives.switch(["sapo", "grpo"])
    at = jax.jit(lambda schedule, start, i: schedule.at(start, i))
    runs = [
        (0, {"sapo.tau_neg": 2.0}, 1, 5, [1.05, 1.525, 2.0]),
        (1, {"grpo.eps_high": 0.4}, 2, 3, [0.2, 0.4, 0.4]),
        (0, {}, 0, 9, [1.05, 1.05, 1.05]),
    ]
    counts = []
    with fakes.Compilations() as compilations:
        for index, end, shape, iterations, expected in runs:
            start = objectives.resolve(both, index=index)
            schedule = Schedule(objectives.resolve(start, **end), shape, iterations)
            found = [at(schedule, start, i) for i in (0, 2, 4)]
            key = next(iter(end), "sapo.tau_neg")
            np.testing.assert_allclose([o.hyperparameters[key] for o in found], expected, rtol=1e-6)
            assert all(int(o.hyperparameters["index"]) == index for o in found)
            counts.append(compilations.count)
    assert len(set(counts)) == 1
