"""A sampler with devices of its own; run by `test_sharding` in a process that has eight."""

import signal

import jax
import numpy as np
import pytest

from sapo_jax import sampler, train
from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.training import checkpoint, settings
from sapo_jax.training.workdir import read_metrics
from tests import fakes, tiny_config
from tests.sampler import test_partial
from tests.sampler.test_engine import G, N, P, T, peaked
from tests.test_staleness import same, saved
from tests.test_train import SHAPED, digest, spawn
from tests.test_train import records as timeless
from tests.training.test_metrics import check

__all__ = ["peaked"]  # a fixture
FIELDS = SHAPED | {
    "iterations": 5, "eval.every": 5, "learner.learning_rate": 1e-3, "staleness": 1,
    "sampler.slots": 0, "sampler.max_new_tokens": 32, "reward.max_length": 32, "reward.buffer": 32,
}  # fmt: skip
OWN = {"sampler.devices": 4}


def run(workdir, **fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(FIELDS | fields)
    checked = settings.from_config(config)
    train.run(checked, workdir)
    return checked


def records(workdir, **fields):
    run(workdir, **fields)
    return read_metrics(workdir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return records(tmp_path_factory.mktemp("alone") / "run")


CASES = {
    "data 4 and data 4": OWN | {"mesh.data": 4},
    "fsdp 2, data 2 and tensor 2, data 2": OWN
    | {"mesh.fsdp": 2, "mesh.data": 2, "sampler.mesh.tensor": 2, "learner.old_logp": "recompute"},
    "one and one": {"sampler.devices": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_run_is_that_of_one_device(name, alone, tmp_path):
    """Up to rounding; a rollout by a policy that an update has already moved would show."""
    found = records(tmp_path / "run", **CASES[name])
    check(found, "", "source=rollout", "sampler.devices", "an evaluation", "eval.every",
          "checkpoint.every", "reward.overlong")  # fmt: skip
    overlap = [r["time/overlap"] for r in found if "time/overlap" in r]
    assert len(overlap) == 3  # the first iteration samples two batches, the last one none
    assert all(seconds > 0 for seconds in overlap)
    for record, expected in zip(found[1:], alone[1:], strict=True):
        for key in ("length/mean", "reward/mean", "policy/age_mean"):
            assert record[key] == pytest.approx(expected[key], rel=1e-6)
        for key in ("policy/loss", "policy/entropy", "grad/norm"):
            assert record[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-5), key


PART = {"sampler.devices": 1, "sampler.budget": 32 * 5, "learner.learning_rate": 1e-4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(workdir, **PART)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "status", "every", "saved_last"),
    [
        ("endless 2", 143, 5, (1,)), ("sigterm 3", 143, 5, (3,)),
        ("rollout 3", -signal.SIGKILL, 1, (1, 2)),
    ],
)  # fmt: skip
def test_a_run_that_is_stopped_while_a_thread_samples_ends_like_a_whole_one(
    stop, status, every, saved_last, whole, tmp_path
):
    """By SIGTERM or SIGKILL, with completions that go on. A rollout that cannot be left would keep
    the process; one that was not expected to be waited for, the iteration before."""
    workdir, checked = whole
    place, fields = tmp_path / "run", PART | {"checkpoint.every": every}
    assert spawn(place, stop, **FIELDS | fields).wait(timeout=120) == status
    latest = checkpoint.Checkpoints(place / "checkpoints").latest()
    assert latest in saved_last
    assert any(saved(place, checked, latest)[1]["begun"])
    run(place, **fields)
    assert timeless(place) == timeless(workdir)
    assert digest(place) == digest(workdir)
    same(saved(place, checked), saved(workdir, checked))


@pytest.mark.slow
def test_completions_go_on_on_a_mesh(peaked):
    """Each part has its own line of prompts, and its own completions that go on."""
    config, weights = peaked
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    placed = jax.device_put(weights, params.shardings(config, mesh))
    whole = test_partial.roll(peaked, fakes.prompts(P, N))
    plan = sampler.Plan((8, 4), (T,), 4, (G, 2))
    found = test_partial.partially([(config, placed)], budget=40 * G, plan=plan)
    assert len(found) > 3
    for rows in found:
        ended = test_partial.done(rows).repeat(G)
        np.testing.assert_array_equal(rows.tokens[ended], whole.tokens[ended])
        np.testing.assert_allclose(
            rows.sampler_logp[ended], whole.sampler_logp[ended], rtol=0, atol=2e-5
        )


REFUSED = [
    ({"sampler.devices": 8}, r"sampler.devices=8: must be at most 7"),
    ({"sampler.devices": 4, "mesh.run": 2}, r"mesh.run=2: must be 1 with sampler.devices=4"),
    ({"sampler.devices": 4, "staleness": 0}, r"staleness=0: must be at least 1 with sampler.dev"),
    ({"sampler.devices": 4, "mesh.data": 8}, r"mesh: .*does not match the number of devices, 4"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_split_is_refused(fields, message):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(FIELDS | fields)
    with pytest.raises(ValueError, match=message):
        settings.from_config(config)
