"""Switches: one executable whose traced index chooses the objective."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, objectives
from sapo_jax.masked import finish
from sapo_jax.objectives import OBJECTIVES, policy_loss, switch
from sapo_jax.types import Batch
from tests import fakes

# Every ratio level, aggregation, KL, and kind of gate.
NAMES = [
    "sapo",
    "gspo_token",
    "dr_grpo",
    "p3o",
    "vespo",
    "gmpo",
    "luspo",
    "cispo",
    "maspo",
    "mhpo",
    "cppo",
]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(3)
    logp, old = rng.normal(-1.5, 0.6, (2, 5, 7)).astype(np.float32)
    mask = np.arange(7) < np.array([7, 3, 0, 1, 5])[:, None]
    return logp, old, rng.normal(size=5).astype(np.float32), mask


@jax.jit
def value_and_gradient(objective, logp, *rest):
    """Loss, metrics and gradient, compiled once for a switch whatever its index."""

    def loss(x):
        return policy_loss(objective, x, *rest)

    return jax.value_and_grad(loss, has_aux=True)(logp)


def test_a_switch_is_the_chosen_member(arrays):
    """Value, metrics and gradient of each member, in one executable for all of them."""
    own = {"max_length": 7.0, "sapo.tau_neg": 1.4, "p3o.kl_coef": 0.3}
    chosen = objectives.resolve(switch(NAMES), **own)
    expected = {}
    for name in NAMES:
        mine = {k.split(".")[-1]: v for k, v in own.items() if k.split(".")[0] == name}
        mine |= {"max_length": 7.0} if name == "dr_grpo" else {}
        expected[name] = value_and_gradient(objectives.resolve(name, **mine), *arrays)
    value_and_gradient(chosen, *arrays)
    with fakes.Compilations() as compilations:
        found = [
            value_and_gradient(objectives.resolve(chosen, index=i), *arrays)
            for i in range(len(NAMES))
        ]
    assert compilations.count == 0
    for name, got in zip(NAMES, found, strict=True):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
        jax.tree.map(close, got, expected[name])
    losses = [float(loss) for (loss, _), _ in found]
    assert len(set(losses)) == len(losses)


def test_runs_of_different_objectives_batch(arrays):
    """Under vmap every run has its own index and its own τ: how a population is trained."""
    chosen = switch(["sapo", "grpo"])
    runs = [{"index": 0, "tau_neg": 2.0}, {"index": 1}, {"index": 0}]
    each = [objectives.resolve(chosen, **run) for run in runs]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.float32(v) for v in x]), *each)
    stacked = objectives.resolve(stacked, index=jnp.array([0, 1, 0]))
    losses = jax.vmap(lambda o: policy_loss(o, *arrays)[0])(stacked)
    alone = [policy_loss(o, *arrays)[0] for o in each]
    np.testing.assert_allclose(losses, alone, rtol=1e-6)
    assert len({float(x) for x in alone}) == 3


def test_hyperparameters_of_all_members_are_reached():
    """A bare name goes to every member that has it; a member's own name wins."""
    chosen = objectives.resolve(switch(["grpo", "dapo", "sapo"]), **{"dapo.eps_high": 0.4})
    chosen = objectives.resolve(chosen, eps_high=0.1, eps_low=0.05, **{"dapo.eps_high": 0.3})
    grpo, dapo, sapo = chosen.members
    assert grpo.hyperparameters["eps_high"] == 0.1
    assert dapo.hyperparameters["eps_high"] == 0.3
    assert dapo.hyperparameters["eps_low"] == 0.05
    assert sapo == OBJECTIVES["sapo"]
    mean = dataclasses.replace(chosen, aggregation="token_mean")
    assert [member.aggregation for member in mean.members] == ["token_mean"] * 3


def test_members_may_be_variants_of_one_preset(arrays):
    base = OBJECTIVES["grpo"]
    named = {"seq": base, "token": dataclasses.replace(base, aggregation="token_mean")}
    chosen = switch(named)
    for i, objective in enumerate(named.values()):
        expected = policy_loss(objective, *arrays)[0]
        assert float(policy_loss(chosen, *arrays, index=i)[0]) == pytest.approx(float(expected))


def test_a_penalty_of_any_member_needs_the_reference(arrays):
    """p3o's KL is to the old policy: it alone needs none."""
    chosen = switch(["sapo", "p3o"])
    assert not chosen.needs_reference
    wanting = objectives.resolve(chosen, **{"sapo.kl_coef": 0.1})
    assert wanting.needs_reference
    with pytest.raises(ValueError, match="ref_logp"):
        policy_loss(wanting, *arrays)
    terms = objectives.policy_terms(wanting, *arrays, ref_logp_BT=arrays[1])
    assert finish(terms)[1]["policy/kl_ref"] > 0


WRONG = [
    ((["sapo", "sap"],), {}, "sap"),
    ((["sapo", "sapo"],), {}, "different names"),
    (([],), {}, "needs objectives"),
    (({"a.b": OBJECTIVES["sapo"]},), {}, "no dot"),
    ((["sapo", "grpo"],), {"index": 2}, r"index=2 must be an integer in 0\.\.1"),
    ((["sapo", "grpo"],), {"index": -1}, r"0\.\.1"),
    ((["sapo", "grpo"],), {"index": 0.5}, r"integer"),
    ((["sapo", "grpo"],), {"sapo.eps_low": 0.2}, "grpo.eps_low"),
    ((["sapo", "grpo"],), {"tau_neg": -1.0}, "sapo.tau_neg=-1.0 must be a number > 0"),
    ((["sapo", "grpo"],), {"tau_neg": np.inf}, "tau_neg=inf must be a number > 0, finite"),
    ((["sapo", "grpo"],), {"kl_coef": np.inf}, "kl_coef=inf must be a number ≥ 0, finite"),
    ((["sapo", "dr_grpo"],), {}, "dr_grpo.max_length"),
]


@pytest.mark.parametrize(("names", "hyperparameters", "message"), WRONG)
def test_wrong_switches_are_refused(names, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        objectives.resolve(switch(*names), **hyperparameters)


@pytest.mark.slow
def test_an_update_takes_a_switch(nano, rng):
    """Diagnostics ask for coefficients and inputs too: they must be the chosen member's."""
    config, weights = nano
    tokens = rng.integers(2, fakes.VOCAB, (4, 8)).astype(np.int32)
    old = rng.normal(-3, 0.3, (4, 8)).astype(np.float32)
    mask, advantages = np.arange(8) >= [[2], [3], [2], [5]], np.float32([1, -1, 0.5, -0.2])
    batch = Batch(tokens, mask, np.ones_like(tokens), old, old, advantages)
    every = {"cppo": OBJECTIVES["cppo"], "wide": OBJECTIVES["grpo"]}

    def gradient(objective):
        hp = learner.Hyperparameters(objective, 1e-3, 0.0, 1.0, 1.0, model=config, head_chunk=16)
        return jax.jit(learner.gradient)(weights, batch, hp)

    found = gradient(objectives.resolve(switch(every), index=1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        gradient(OBJECTIVES["grpo"]),
    )
