"""Rollouts within a budget: over several of them, each row is the one of a whole rollout."""

import itertools

import jax
import numpy as np
import pytest

from sapo_jax import model, sampler
from sapo_jax.sampler import results
from sapo_jax.types import GOES_ON, LENGTH, STOP
from tests import fakes
from tests.sampler.test_engine import G, N, P, T, peaked, roll, teacher_forcing

__all__ = ["peaked"]  # a fixture
PLANS = {
    "all at once": sampler.make_plan(P, T, group_size=G, whole=True),
    "five slots, refilled by twos, shrinking": sampler.Plan((5, 4, 2), (T,), 2, (G, 3, 1)),
}


def partially(policies, budget, plan=PLANS["all at once"], prompts=None, on_groups=None):
    """Rollouts until every prompt is done, each by the next policy; those done begin again."""
    config, _ = policies[0]
    prompts = fakes.prompts(P, N) if prompts is None else prompts
    prompts = prompts.replace(occurrence=np.zeros(P, np.int32), iteration=np.full(P, 3, np.int32))
    begun, begun_P, found = results.none_begun(config, P, G, T), np.zeros(P, bool), []
    while not found or not np.any([done(rows) for rows in found], axis=0).all():
        rows, begun = sampler.partial_rollout(
            policies[min(len(found), len(policies) - 1)][1], config, prompts, begun,
            begun_P=begun_P, budget=budget, group_size=G, max_new_tokens=T, temperature=1.0,
            seed=11, policy_step=3 + len(found), plan=plan, on_groups=on_groups,
        )  # fmt: skip
        found.append(jax.device_get(rows))
        begun_P = np.asarray(begun.tokens >= 0).any((1, 2))
    return found


@pytest.fixture(scope="module")
def moe():
    config = model.make("nano_moe", vocab_size=fakes.VOCAB, stop_tokens=(1, 4))
    return config, fakes.weights(config)


def done(rows):
    """Groups whose completions have all ended."""
    return (rows.finished != GOES_ON).reshape(P, G).all(-1)


def test_a_huge_budget_is_a_whole_rollout(peaked):
    whole = roll(peaked, fakes.prompts(P, N), plan=PLANS["all at once"])
    (rows,) = partially([peaked], budget=2**30)
    assert set(rows.token_step[rows.mask]) == {3}
    jax.tree.map(np.testing.assert_array_equal, rows.replace(token_step=None), whole)


@pytest.mark.parametrize("name", list(PLANS))
def test_rows_go_on_with_their_tokens(peaked, name):
    """By one policy: what is computed anew is what was there, and every token has its own noise."""
    whole, seen = roll(peaked, fakes.prompts(P, N)), []

    def report(index, tokens, count, finished):
        seen.extend(index.tolist())
        assert set(np.ravel(finished)) <= {STOP, LENGTH}

    found = partially([peaked], budget=5 * P * G, plan=PLANS[name], on_groups=report)
    assert len(found) > 3
    ended = np.zeros(P, bool)
    for rows in found:
        first = (done(rows) & ~ended).repeat(G)
        ended |= done(rows)
        for name in ("tokens", "mask", "segments", "finished", "prompt_id", "sample_index"):
            np.testing.assert_array_equal(getattr(rows, name)[first], getattr(whole, name)[first])
        np.testing.assert_allclose(rows.sampler_logp[first], whole.sampler_logp[first], atol=2e-5)
    assert len(seen) == sum(done(rows).sum() for rows in found)
    assert ended.all()


def test_each_token_is_of_the_policy_of_its_step(peaked):
    """Tokens stay when the policy moves; those behind them are drawn as it would from them."""
    config, weights = peaked
    policies = [(config, fakes.perturbed(weights, 0.02, seed=s)) for s in range(3)]
    found = partially(policies, budget=6 * P * G)
    scored = [teacher_forcing(policy, found[-1], 1.0) for policy in policies]
    last, fresh = found[-1], np.ones(len(found[-1].tokens), bool)  # never done before
    for before, after in itertools.pairwise(found):
        goes_on = ~done(before).repeat(G)
        kept = before.mask & goes_on[:, None]
        for name in ("tokens", "sampler_logp", "token_step"):
            np.testing.assert_array_equal(getattr(after, name)[kept], getattr(before, name)[kept])
        fresh &= goes_on
    assert fresh.any()
    for step in range(3, 3 + len(found)):
        at = last.mask & (last.token_step == step) & fresh[:, None]
        gap = np.abs(scored[min(step - 3, 2)] - last.sampler_logp)[at]
        assert at.sum() == 0 or gap.max() <= 2e-5
        if step < 5:
            assert at.any()
            assert np.abs(scored[2] - last.sampler_logp)[at].max() > 1e-3


@pytest.mark.slow
def test_routing_goes_on_with_its_tokens(moe):
    """What was recorded of a token stays; prompt and pads are as in a whole rollout."""
    whole = roll(moe, fakes.prompts(P, N))
    for rows in partially([moe], budget=5 * P * G):
        ended = done(rows).repeat(G)
        np.testing.assert_array_equal(rows.tokens[ended], whole.tokens[ended])
        np.testing.assert_array_equal(rows.routing[ended], whole.routing[ended])
