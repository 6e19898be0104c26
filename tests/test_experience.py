"""What turns judged rollouts into minibatches: KL in the reward, sampler corrections."""

import numpy as np

from sapo_jax import advantages, corrections, experience
from sapo_jax.types import Batch

MASK = np.arange(5) < np.array([2, 5, 3, 4, 1, 5, 2, 2])[:, None]
REWARDS = np.float32([1, 0, 0, 1, 1, 1, 1, 1])


def parts(rng):
    """Two minibatches of two groups of two."""
    logp = rng.normal(-1, 0.3, (3, 8, 5)).astype(np.float32)
    old, ref, drawn = np.where(MASK, logp, np.nan)
    fields = {"tokens": MASK.astype(np.int32), "mask": MASK, "segments": MASK.astype(np.int32)}
    fields |= {"old_logp": old, "ref_logp": ref, "sampler_logp": drawn, "advantages": REWARDS * 0}
    whole = Batch(**fields)
    halves = [{k: v[i : i + 4] for k, v in fields.items()} for i in (0, 4)]
    return whole, tuple(Batch(**half) for half in halves)


def judged(halves, kl_coef=0.0, kl="k1", correction="none", estimator="mean", **bounds):
    return experience.judged(
        halves, REWARDS, kl_coef, bounds,
        estimator=estimator, group_size=2, kl=kl, correction=correction,
    )  # fmt: skip


def test_kl_in_the_reward_is_a_sum_over_the_completion(rng):
    """R − β Σ_t KL_t before the baseline: the mean over tokens would favour long completions."""
    whole, halves = parts(rng)
    d = np.where(MASK, whole.old_logp - whole.ref_logp, 0)
    sums = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    for kind, values in sums.items():
        found, metrics = judged(halves, 0.3, kind)
        expected = advantages.mean(REWARDS - 0.3 * values.sum(-1).astype(np.float32), 2)
        got = np.concatenate([half.advantages for half in found])
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert abs(float(metrics["reward/kl"]) - values.sum(-1).mean()) < 1e-6
    assert np.any(got[4:])  # a KL gives a signal where all rewards are equal


def test_whitening_is_over_the_whole_iteration(rng):
    """Advantages by minibatch would differ for the estimator that compares all rows."""
    _, halves = parts(rng)
    found, _ = judged(halves, estimator="reinforce_pp")
    got = np.concatenate([half.advantages for half in found])
    np.testing.assert_allclose(got, advantages.reinforce_pp(REWARDS), atol=1e-6)


def test_corrections_become_weights_of_the_minibatches(rng):
    whole, halves = parts(rng)
    found, metrics = judged(halves, correction="token_tis", high=1.1)
    expected, cut = corrections.weights(
        "token_tis", whole.old_logp, whole.sampler_logp, MASK, high=1.1
    )
    np.testing.assert_array_equal(np.concatenate([half.weights for half in found]), expected)
    assert 0 < float(metrics["correction/cut"]) == float(cut["correction/cut"]) < 1
    assert judged(halves)[0][0].weights is None
