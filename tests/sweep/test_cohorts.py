"""Which runs of a sweep share their executables, and what is refused."""

import jax
import numpy as np
import pytest

from sapo_jax import learner
from sapo_jax.axes import axis, product, zip_
from sapo_jax.sweep import cohorts
from sapo_jax.sweep.population import hyperparameters
from tests import tiny_config


def base(**fields):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({"sampler.slots": 0, **fields})
    return config


def test_what_is_traced_shares_and_what_is_not_separates():
    """A batch size is static; seeds, rates, temperatures of gates and samplers are not."""
    traced = product(
        axis("seed", 0, 1),
        axis("objective.tau_neg", 1.0, 2.0),
        axis("learner.learning_rate", 1e-3, 1e-2),
        axis("sampler.temperature", 1.0, 0.8),
    )
    sweep = product(axis("batch.group_size", 2, 4), traced)
    small, large = cohorts.make(base(), sweep)
    assert [run.config.batch.group_size for run in small.runs] == [2] * 16
    assert [run.config.batch.group_size for run in large.runs] == [4] * 16
    assert small.names[1] == (
        "batch.group_size=2,seed=0,objective.tau_neg=1.0,learner.learning_rate=0.001,"
        "sampler.temperature=0.8"
    )
    hp = hyperparameters(small.runs)
    np.testing.assert_allclose(hp.temperature, [1.0, 0.8] * 8)
    np.testing.assert_allclose(hp.learning_rate[:4], [1e-3, 1e-3, 1e-2, 1e-2])
    np.testing.assert_allclose(hp.objective.hyperparameters["tau_neg"][:8], [1.0] * 4 + [2.0] * 4)


def test_objectives_become_a_switch():
    """Runs of several objectives share one, in which each has its own name, index and values."""
    sweep = zip_(
        axis("objective.name", "sapo", "grpo", "dr_grpo", "sapo"),
        axis("objective.max_length", None, None, 32.0, None),
        axis("objective.eps_high", None, 0.3, None, None),
        axis("objective.tau_pos", None, None, None, 2.0),
    )
    (cohort,) = cohorts.make(base(), sweep)
    held = hyperparameters(cohort.runs).objective.hyperparameters
    np.testing.assert_array_equal(held["index"], [0, 1, 2, 0])
    assert held["index"].dtype == np.int32
    assert held["sapo.tau_pos"][3] == 2
    assert held["sapo.tau_pos"][0] == 1
    assert held["grpo.eps_high"][1] == np.float32(0.3)
    np.testing.assert_array_equal(held["dr_grpo.max_length"], [32] * 4)


def test_schedules_share_one_program():
    """Constant, linear and cosine, of τ and of ε, with other ends: one cohort, each its own."""
    runs = [
        {"objective.schedule": "cosine", "objective.end.tau_neg": 3.05},
        {"objective.name": "grpo", "objective.schedule": "linear", "objective.end.eps_high": 0.4},
        {"objective.tau_neg": 2.0},
    ]
    (cohort,) = cohorts.make(base(iterations=5), runs)
    at = jax.jit(jax.vmap(lambda hp, i: hp.at(i).objective, (0, None)))
    both = hyperparameters(cohort.runs)
    found = [at(both, i).hyperparameters for i in range(5)]
    share = (1 - np.cos(np.pi * np.arange(5) / 4)) / 2
    taus, epsilons = ([now[k] for now in found] for k in ("sapo.tau_neg", "grpo.eps_high"))
    np.testing.assert_allclose(np.array(taus)[:, 0], 1.05 + 2 * share, rtol=1e-6)
    np.testing.assert_array_equal(np.array(taus)[:, 2], 2.0)
    np.testing.assert_allclose(np.array(epsilons)[:, 1], 0.2 + 0.05 * np.arange(5), rtol=1e-6)
    np.testing.assert_array_equal([now["index"] for now in found], [[0, 1, 0]] * 5)
    shown = [run.scheduled(3) for run in cohort.runs]
    expected = [{"objective/tau_neg": 2.05}, {"objective/eps_high": 0.3}, {}]
    assert shown == [pytest.approx(each) for each in expected]


def test_an_objective_that_replays_has_programs_of_its_own():
    """The paper's GRPO-R2; without experts there is nothing to replay, and it is a plain member."""
    sweep = axis("objective.name", "sapo", "grpo", "grpo_r2")
    sparse = {"model.preset": "nano_moe", "learner.old_logp": "recompute"}
    plain, replaying = cohorts.make(base(**sparse), sweep)
    assert [run.hp.static.routing_replay for run in (plain.lead, replaying.lead)] == ["none", "R2"]
    assert len(plain.runs) == 2
    (dense,) = cohorts.make(base(), sweep)
    held = hyperparameters(dense.runs).objective.hyperparameters
    np.testing.assert_allclose(held["grpo_r2.eps_high"], 0.27)
    with pytest.raises(ValueError, match=r"routing_replay='R3': must be 'none' or 'R2': .*grpo_r2"):
        cohorts.make(base(**sparse, **{"learner.routing_replay": "R3"}), sweep[2:])
    with pytest.raises(ValueError, match=r"old_logp='sampler': must be 'recompute' with .*R2"):
        cohorts.make(base(**{"model.preset": "nano_moe"}), sweep[2:])


def test_a_kl_penalty_separates():
    """A reference policy is scored by programs of its own."""
    fields = {"init_from": "somewhere"}
    parts = cohorts.make(base(**fields), axis("objective.kl_coef", 0.0, 0.1, 0.2))
    assert [len(part.runs) for part in parts] == [1, 2]


def test_large_cohorts_are_cut_evenly():
    parts = cohorts.make(base(), axis("seed", *range(10)), most=4)
    assert [len(part.runs) for part in parts] == [3, 3, 4]
    assert [name for part in parts for name in part.names] == [f"seed={i}" for i in range(10)]


def test_hyperparameters_share_one_form():
    """What jit sees is the same for every cut of a cohort: arrays, and the same static fields."""
    a, b = cohorts.make(base(), axis("learner.learning_rate", 1e-3, 2e-3, 3e-3, 4e-3), most=2)
    both = [hyperparameters(cohort.runs) for cohort in (a, b)]
    assert isinstance(both[0], learner.Hyperparameters)
    same = [x.dtype == y.dtype == np.float32 for x, y in zip(*_leaves(*both), strict=True)]
    assert all(same)


def _leaves(*trees):
    import jax

    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    return [jax.tree.leaves(tree) for tree in trees]


REFUSED = [
    (
        axis("objectve.tau_neg", 1.0),
        "'objectve.tau_neg'; the nearest is 'objective.tau_neg'",
    ),
    (axis("sed", 1), "the run sed=1: there is no field 'sed'; the nearest is 'seed'"),
    (axis("objective.tau_neg", "x"), "the run objective.tau_neg=x: .*float"),
    (axis("mesh.fsdp", 2), "the run mesh.fsdp=2: .*mesh"),
    (axis("objective.tau_neg", -1.0), "the run objective.tau_neg=-1.0: .*tau_neg"),
    (axis("seed", "x"), "the run seed=x: "),
    (axis("sampler.slots", 4), "sampler.slots.*0 in a sweep without a config.mesh"),
    (axis("seed", 1, 1), "two runs of the sweep are the same: seed=1 and seed=1"),
    ([{"seed": 1, "name": "a"}, {"name": "a", "seed": 1}], "the same: seed=1,name=a and name=a,"),
    (axis("learner.learning_rate", 1, 1.0), "the same: learner.learning_rate=1 and "),
    (axis("name", "a/b", "a_b"), "would share the directory name=a_b"),
    ([], "the sweep has no runs"),
]


@pytest.mark.parametrize(("sweep", "message"), REFUSED)
def test_mistakes_are_named_before_anything_compiles(sweep, message):
    with pytest.raises(ValueError, match=message):
        cohorts.make(base(), sweep)


@pytest.mark.parametrize("sweep", ["seed", {"seed": 1}, 3, [3], [("seed", 1)], [{3: 1}]])
def test_what_is_no_list_of_changes_is_refused(sweep):
    with pytest.raises(
        ValueError, match=r"get_sweep\(\) must return a list of what each run chang"
    ):
        cohorts.listed(sweep)


def test_a_generator_of_changes_is_read_once():
    runs = cohorts.listed({"seed": seed} for seed in (0, 1))
    assert cohorts.restrict(runs, ["seed=1"]) == [{"seed": 1}]
    assert cohorts.listed(None) == []
