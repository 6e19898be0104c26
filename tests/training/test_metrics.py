"""The table of metric keys says what runs write, no more and no less.

`check` is called where tests train: in test_train, test_build, test_routing, test_export
and test_own; an evaluation alone in test_evaluate.
"""

from sapo_jax import rewards
from sapo_jax.report import sweep_stats
from sapo_jax.report.run import summary
from sapo_jax.training import progress
from sapo_jax.training.metrics import METRICS

CHECKED = {
    "": "test_train", "source=rollout": "test_train", "eval.every": "test_train",
    "checkpoint.every": "test_train", "batch.oversample": "test_train",
    "objective.kl_coef or reward.kl_coef": "test_train",
    "correction.name": "test_train", "objective.schedule": "test_train",
    "tasks": "test_build", "an evaluation, tasks": "test_build",
    "a model with experts": "test_routing", "a model with experts, source=rollout": "test_routing",
    "sampler.budget": "test_budget", "sampler.devices": "apart",
    "learner.router_aux_coef": "test_routing", "an evaluation": "test_export",
    "an evaluation, evals": "test_evals", "sapo_jax.evaluate": "test_export",
    "reward.function": "test_own",
    "an evaluation, reward.function": "test_evaluate",
    **dict.fromkeys((f"reward.{part}" for part in rewards.PARTS[1:]), "test_train"),
}  # fmt: skip


def check(found, *conditions, tasks=("",), samples=4):
    """The keys of records, or of one, are those of the table that have one of the conditions."""
    records = [found] if isinstance(found, dict) else found
    expected = {
        key.replace("<task>", task)
        .replace("<name>", task)
        .replace("<k>", str(k))
        .replace("<field>", "tau_neg")
        for key, metric in METRICS.items()
        if metric.when in conditions
        for task in tasks
        for k in (1, samples)
    }
    assert {key for record in records for key in record} == expected


def test_every_row_is_held_to_what_some_test_writes():
    """A row with a new condition needs a call of `check` where a test fulfils it."""
    assert {metric.when for metric in METRICS.values()} == set(CHECKED)


def test_each_part_of_a_reward_has_a_row():
    assert {f"reward/{part}" for part in rewards.PARTS} <= set(METRICS)


def test_the_minutes_of_a_run_hold_what_came_before_its_first_iteration():
    """Restoring and compiling were left out: four iterations of half a minute took 0.0 minutes."""
    records = [
        {"iteration": 0, "eval/pass_at_1": 0.1},
        {"iteration": 1, "time/startup": 100.0, "time/iteration": 15.0, "time/eval": 5.0},
        {"iteration": 2, "time/iteration": 30.0, "eval/pass_at_1": 0.2},
    ]
    assert progress.reached(records).startswith("2 iterations in 2.5 minutes")
    run = sweep_stats.Run("a", "d/a", {}, records)
    assert sweep_stats.hours([run, run]) == 300 / 3600
    assert summary(records)["minutes"] == 2.5
