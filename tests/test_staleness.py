"""Staleness: batches that wait, whose policy sampled them, and what a checkpoint holds of them."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from sapo_jax import axes, learner, train
from sapo_jax.learner import step
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import queue, settings
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.workdir import read_samples
from tests import tiny_config
from tests.sweep.test_population import Bar, KilledError, kill
from tests.test_train import SHAPED, digest, records, spawn

pytestmark = pytest.mark.usefixtures("no_plots")
SMALL = SHAPED | {
    "model.num_hidden_layers": 1, "sampler.slots": 0, "iterations": 5, "eval.every": 0,
    "checkpoint.every": 2, "learner.learning_rate": 3e-3,
}  # fmt: skip
AGE = ("policy/age_mean", "policy/stale", "histogram/age")


def config_of(**fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(SMALL | fields)
    return config


def run(workdir, **fields):
    checked = settings.from_config(config_of(**fields))
    train.run(checked, workdir)
    return checked


def saved(workdir, checked, iteration=None):
    """The arrays of a checkpoint, those that wait included, and what else it holds."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        iteration = iteration or checkpoints.latest()
        left = min(checked.config.staleness, checked.config.iterations - iteration)
        wanted = queue.abstract(checked, iteration, learner.abstract(checked.hp), [left])
        return jax.device_get(checkpoints.restore(iteration, wanted))


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])
    assert first[1] == second[1]


@pytest.fixture
def learnt(monkeypatch):
    """The minibatches that updates take, in their order, and the parameters before each."""
    found, update = [], step.update

    def noted(state, batch, *more):
        found.append(jax.device_get((state.params, batch)))
        return update(state, batch, *more)

    monkeypatch.setattr(step, "update", noted)
    return found


def test_without_learning_no_metric_tells_staleness(tmp_path):
    """Noise and prompts go by the batch: with a policy that stays, nothing else differs."""
    fields = {"learner.learning_rate": 0.0, "learner.old_logp": "recompute"}
    run(tmp_path / "none", **fields)
    run(tmp_path / "two", staleness=2, **fields)
    expected, found = records(tmp_path / "none"), records(tmp_path / "two")
    assert [r["policy/age_mean"] for r in found] == [0, 1, 2, 2, 2]
    assert [r["policy/stale"] for r in found] == [0, 1, 1, 1, 1]
    assert found[3]["histogram/age"]["counts"][:4] == [0, 0, 8 * 4 * found[3]["length/mean"], 0]
    assert {r["policy/age_mean"] for r in expected} == {0}
    for record in expected + found:
        for key in AGE:
            del record[key]
    assert found == expected
    rows = [read_samples(tmp_path / name, 4) for name in ("none", "two")]
    assert {row.pop("policy_step") for row in rows[0]} == {4}
    assert {row.pop("policy_step") for row in rows[1]} == {2}
    assert rows[0] == rows[1]


def test_old_logp_is_of_the_policy_that_sampled(tmp_path, learnt):
    """By teacher forcing with the parameters of that iteration, and by no other's."""
    checked = run(tmp_path / "run", staleness=2)
    updates = learnt[2:]  # after the warm-up
    for iteration in range(1, 6):
        for minibatch in range(2):
            _, batch = updates[2 * (iteration - 1) + minibatch]
            gaps = []
            for sampled in range(1, iteration + 1):
                params, _ = updates[2 * (sampled - 1)]
                logp = np.asarray(learner.score(params, batch, checked.hp))
                gaps.append(np.abs(logp - batch.old_logp)[batch.mask].max())
            assert np.argmin(gaps) + 1 == max(1, iteration - 2)
            assert min(gaps) < 1e-4
            assert sorted(gaps)[1:2] == [] or sorted(gaps)[1] > 1e-3
