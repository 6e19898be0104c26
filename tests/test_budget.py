"""Partial rollouts: what a budget leaves over goes on, in runs, checkpoints and populations."""

import numpy as np
import pytest

from sapo_jax import axes
from sapo_jax.learner import step
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import settings, startup
from sapo_jax.training.workdir import read_metrics, read_samples
from tests import fakes
from tests.sweep.test_population import Bar, KilledError, kill
from tests.test_staleness import config_of, run, same, saved
from tests.test_train import digest, records
from tests.training.test_metrics import check

pytestmark = pytest.mark.usefixtures("no_plots")
LONG = {
    "sampler.max_new_tokens": 24, "reward.max_length": 24, "reward.buffer": 24, "iterations": 7,
    "learner.learning_rate": 1e-4,
}  # fmt: skip
PART = LONG | {"batch.group_size": 2, "sampler.budget": 16 * 9}  # 16 rows may need 23 steps


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A run with staleness and a budget, and how many programs it compiled behind its start."""
    workdir = tmp_path_factory.mktemp("stale") / "run"
    late, warm_up = fakes.Compilations(), startup.warm_up

    def counted(*arguments):
        warm_up(*arguments)
        late.__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "warm_up", counted)
        checked = run(workdir, staleness=1, **PART)
        late.__exit__()
    return workdir, checked, late


@pytest.mark.slow
def test_a_huge_budget_changes_nothing(tmp_path):
    """Token by token: every metric and sample is that of whole rollouts."""
    fields = LONG | {"iterations": 3}
    run(tmp_path / "whole", **fields)
    run(tmp_path / "huge", **fields | {"sampler.budget": 2**30})
    found = records(tmp_path / "huge")
    assert {r.pop("sampler/goes_on") for r in found} == {0}
    assert found == records(tmp_path / "whole")
    assert digest(tmp_path / "huge") == digest(tmp_path / "whole")


def test_what_has_not_ended_goes_on(stale):
    """No prompt is lost, none comes twice, and tokens of several policies are in a batch."""
    workdir, checked, late = stale
    assert late.count == 0, late.names
    conditions = ("source=rollout", "sampler.budget", "reward.overlong", "checkpoint.every")
    check(read_metrics(workdir), "", *conditions)
    found = records(workdir)
    some = [r for r in found if r["sampler/goes_on"] < 1]
    assert len(some) > 4
    assert sum(r["sampler/goes_on"] > 0 for r in some) > 3
    assert max(r["policy/age_mean"] for r in some) > 1.3
    assert all(np.isfinite(r["grad/norm"]) for r in some)
    for record in found:
        tokens = sum(record["histogram/age"]["counts"])
        groups = 8 * (1 - record["sampler/goes_on"])
        assert tokens == pytest.approx((record["length/mean"] or 0) * 2 * groups)
    for record in read_metrics(workdir)[-7:]:
        tokens = record["time/tokens_per_second"] * record["time/iteration"]
        assert tokens == pytest.approx(sum(record["histogram/age"]["counts"]))
    _, meta = saved(workdir, checked)
    learnt = sum(round(8 * (1 - r["sampler/goes_on"])) for r in found)
    under_way = sum(place is not None for place in meta["begun"])
    (position,) = meta["position"].values()
    assert position["read"] == learnt + under_way
    numbers = [place["read"] for place in meta["begun"] if place]
    assert len(set(numbers)) == len(numbers)
    prompts = [r["prompt"] for i in range(1, 8) for r in read_samples(workdir, i)]
    assert prompts


def test_a_killed_run_ends_like_an_uninterrupted_one(stale, tmp_path):
    """Begun completions are in the checkpoint, beside what waits."""
    workdir, checked, _ = stale
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, step, "update", 2 + 2 * 4 + 2)
        with pytest.raises(KilledError):
            run(tmp_path / "run", staleness=1, **PART)
    arrays, meta = saved(tmp_path / "run", checked, 4)
    assert (arrays["begun"]["tokens"] >= 0).any()
    assert len(meta["begun"]) == 8
    run(tmp_path / "run", staleness=1, **PART)
    assert records(tmp_path / "run") == records(workdir)
    assert digest(tmp_path / "run") == digest(workdir)
    same(saved(tmp_path / "run", checked), saved(workdir, checked))


@pytest.mark.slow
def test_a_population_is_its_runs_alone(stale, tmp_path):
    workdir, checked, _ = stale
    (cohort,) = cohorts.make(config_of(staleness=1, **PART), axes.axis("seed", 0, 3))
    assert cohort.method == "map"
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, step, "update", 2 + 2 * 2 * 4 + 3)
        with pytest.raises(KilledError):
            schedule.run_cohort(cohort, tmp_path, Bar())
    schedule.run_cohort(cohort, tmp_path, Bar())
    assert records(tmp_path / cohort.names[0]) == records(workdir)
    same(saved(tmp_path / cohort.names[0], checked), saved(workdir, checked))


REFUSED = [
    ({"sampler.budget": -1}, r"config.sampler.budget=-1: must be at least 0"),
    ({"sampler.budget": 31}, r"config.sampler.budget=31: must be 0, or at least 32, the rows of"),
    ({"source": "demonstrations", "objective.name": "reinforce"},
     r"config.sampler.budget=288: must be 0, whole rollouts, with source='demonstrations'"),
    ({"advantages": "reinforce_pp"}, r"config.sampler.budget=288: must be 0, .* compare all rows"),
    ({"learner.old_logp": "recompute"}, r"old_logp='recompute': must be 'sampler' with sampler.bu"),
    ({"population.method": "vmap"}, r"population.method='vmap': must be 'auto' or 'map' with sam"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_has_no_parts_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        settings.from_config(config_of(**{"sampler.budget": 288} | fields))
