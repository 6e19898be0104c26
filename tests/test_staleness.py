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


@pytest.mark.slow
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


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    """What waited is in the checkpoint: sampled again, it would be of a later policy. Behind the
    last iteration nothing waits."""
    checked = run(tmp_path / "whole", staleness=2)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, step, "update", 2 + 2 * 4 + 2)  # in iteration 5, when 2 is saved, 4 perhaps
        with pytest.raises(KilledError):
            run(tmp_path / "run", staleness=2)
    arrays, meta = saved(tmp_path / "run", checked, 4)
    assert [len(one) for one in arrays["queue"]] == [2]
    ((one,),) = [meta["queue"]]
    assert one["steps"] == [[3, round(one["metrics"]["length/mean"] * 32)]]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, train, "write_samples", 2)
        with pytest.raises(KilledError):
            run(tmp_path / "run", staleness=2)
    run(tmp_path / "run", staleness=2)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    state, meta = saved(tmp_path / "run", checked)
    same((state, meta), saved(tmp_path / "whole", checked))
    assert int(state.iteration) == 5
    assert meta["queue"] == []


EVALS = {
    "own": {}, "greedy": {"samples": 2, "temperature": 0.0},
    "more": {"task": {"name": "chain_sum", "options": {"terms": 3, "modulus": 10}}, "prompts": 4},
}  # fmt: skip
EVERYTHING = {
    "staleness": 2, "evals": EVALS, "batch.prompts": 16, "batch.group_size": 2,
    "batch.minibatches": 16, "eval.every": 2, "lora.rank": 2, "learner.weight_decay": 0.1,
    "data.max_prompt_tokens": 8, "objective.kl_coef": 0.1, "init_from": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """The run whose policy is the base of adapters, and the reference."""
    workdir = tmp_path_factory.mktemp("origin") / "run"
    run(workdir, **{"data.max_prompt_tokens": 8, "iterations": 1})
    return str(workdir)


@pytest.fixture(scope="module")
def whole(origin, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(workdir, **EVERYTHING | {"init_from": origin})


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["checkpoint 4", "minibatch 42"])  # the latter in iteration 5
def test_everything_at_once_ends_like_an_uninterrupted_run(stop, whole, origin, tmp_path):
    """By SIGKILL, with named evaluations, 16 minibatches and LoRA."""
    workdir, checked = whole
    place = tmp_path / "run"
    fields = SMALL | EVERYTHING | {"init_from": origin}
    assert spawn(place, stop, **fields).wait() == -signal.SIGKILL
    arrays, meta = saved(place, checked)
    assert len(arrays["queue"]) == len(meta["queue"]) == min(2, 5 - int(arrays["iteration"]))
    assert all(len(one) == 16 for one in arrays["queue"])
    run(place, **EVERYTHING | {"init_from": origin})
    assert records(place) == records(workdir)
    assert digest(place) == digest(workdir)
    same(saved(place, checked), saved(workdir, checked))
    assert len(records(place)[-1]["minibatch"]) == 16
    assert {f"eval/{name}/pass_at_1" for name in EVALS} <= set(records(place)[-2])


@pytest.mark.slow
def test_a_population_by_map_is_its_runs_alone(whole, origin, tmp_path):
    """Killed in an update, and then left alone."""
    workdir, checked = whole
    config = config_of(**EVERYTHING | {"init_from": origin, "population.method": "map"})
    (cohort,) = cohorts.make(config, axes.axis("seed", 0, 3))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, step, "update", 16 + 2 * 2 * 16 + 19)  # of the second run, in iteration 3
        with pytest.raises(KilledError):
            schedule.run_cohort(cohort, tmp_path, Bar())
    schedule.run_cohort(cohort, tmp_path, Bar())
    first = tmp_path / cohort.names[0]
    assert records(first) == records(workdir)
    assert digest(first) == digest(workdir)
    same(saved(first, checked), saved(workdir, checked))


@pytest.mark.slow
def test_a_population_by_vmap_goes_on_where_it_stopped(tmp_path):
    """The queue of several runs is one, with an axis for them."""
    fields = {"staleness": 1, "population.method": "vmap", "checkpoint.every": 3}
    (cohort,) = cohorts.make(config_of(**fields), axes.axis("seed", 0, 3))
    schedule.run_cohort(cohort, tmp_path / "whole", Bar())
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, learner, "end_iteration", 5)
        with pytest.raises(KilledError):
            schedule.run_cohort(cohort, tmp_path / "killed", Bar())
    assert (tmp_path / "killed" / "checkpoints" / "3").exists()
    schedule.run_cohort(cohort, tmp_path / "killed", Bar())
    for name in cohort.names:
        found, expected = (records(tmp_path / place / name) for place in ("killed", "whole"))
        assert found == expected
        assert [r["policy/age_mean"] for r in found] == [0, 1, 1, 1, 1]


def test_a_batch_whose_advantages_are_lost_can_wait():
    """Updates skip it; a checkpoint that could not hold it would end the run before."""
    metrics, row = {"reward/kl": np.nan, "reward/mean": 0.5}, {"advantage": np.nan, "reward": 1.0}
    one = queue.Experience((), [metrics], [[row]], [[(1, 7)]])
    meta = {"queue": queue.meta([one], 0)}
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    state = dict.fromkeys(("iteration", "update", "params", "opt_state"))
    _, (again,), _ = queue.unpack(state | {"queue": [[]]}, [meta])
    np.testing.assert_equal(again.metrics, [metrics])
    assert again.samples == [[{"advantage": None, "reward": 1.0}]]


def test_a_queue_of_another_staleness_is_refused(tmp_path):
    """The config of a directory cannot change; a checkpoint can be copied or edited."""
    run(tmp_path / "run", iterations=2)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"staleness": 1, "iterations": 4}))
    message = r"config.staleness=1: must be what the run was saved with: behind iteration 2 its "
    message += "checkpoint has 0 batches that wait, and 1 are needed"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", staleness=1, iterations=4)
    with pytest.raises(ValueError, match="staleness: stored 1, given 0"):
        run(tmp_path / "run", iterations=4)


REFUSED = [
    ({"staleness": -1}, r"config.staleness=-1: must be at least 0"),
    ({"staleness": 1, "source": "demonstrations"},
     r"config.staleness=1: must be 0 with source='demonstrations'"),
    ({"staleness": 1, "sampler.devices": 4096}, r"sampler.devices=4096: must be at most"),
    ({"sampler.devices": -1}, r"sampler.devices=-1: must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_wait_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        settings.from_config(config_of(**fields))
