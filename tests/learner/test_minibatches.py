"""What turns judged rows into minibatches: KL in the reward, corrections, dynamic sampling."""

import numpy as np
import pytest

from sapo_jax import advantages, corrections
from sapo_jax.learner import minibatches
from sapo_jax.types import Batch

MASK = np.arange(5) < np.array([2, 5, 3, 4, 1, 5, 2, 2])[:, None]
REWARDS = np.float32([1, 0, 0, 1, 1, 1, 1, 1])


def rows(rng):
    """Four groups of two, with NaN at the pads."""
    logp = rng.normal(-1, 0.3, (3, 8, 5)).astype(np.float32)
    old, ref, drawn = np.where(MASK, logp, np.nan)
    tokens = MASK.astype(np.int32)
    return Batch(tokens, MASK, tokens, drawn, old, REWARDS * 0, ref)


def judged(batch, kl_coef=0.0, kl="k1", correction="none", estimator="mean", **bounds):
    return minibatches.make_minibatches(
        batch, REWARDS, kl_coef, bounds,
        estimator=estimator, group_size=2, kl=kl, correction=correction, parts=2,
    )  # fmt: skip


def test_kl_in_the_reward_is_a_sum_over_the_completion(rng):
    """R − β Σ_t KL_t before the baseline: the mean over tokens would favour long completions."""
    whole = rows(rng)
    d = np.where(MASK, whole.old_logp - whole.ref_logp, 0)
    sums = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    for kind, values in sums.items():
        found, metrics = judged(whole, 0.3, kind)
        expected = advantages.mean(REWARDS - 0.3 * values.sum(-1).astype(np.float32), 2)
        got = np.concatenate([half.advantages for half in found])
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert abs(float(metrics["reward/kl"]) - values.sum(-1).mean()) < 1e-6
    assert np.any(got[4:])  # a KL gives a signal where all rewards are equal


@pytest.mark.parametrize("estimator", sorted(advantages.ESTIMATORS))
def test_a_small_kl_changes_little(rng, estimator):
    """Also where all rewards of a group are equal: its rounding errors are not normalised."""
    whole = rows(rng)
    bare, near, far = (
        np.concatenate([half.advantages for half in judged(whole, c, estimator=estimator)[0]])
        for c in (0.0, 1e-5, 1e-2)
    )
    # To the last bit: one of the two is compiled as a whole.
    np.testing.assert_allclose(bare, advantages.ESTIMATORS[estimator](REWARDS, 2), rtol=1.2e-7)
    assert 0 < np.abs(near - bare).max() < 1e-3
    np.testing.assert_allclose((far - bare) / 1e-2, (near - bare) / 1e-5, atol=0.05)


def test_whitening_is_over_the_whole_iteration(rng):
    """Advantages by minibatch would differ for the estimator that compares all rows."""
    whole = rows(rng)
    found, _ = judged(whole, estimator="reinforce_pp")
    got = np.concatenate([half.advantages for half in found])
    np.testing.assert_allclose(got, advantages.reinforce_pp(REWARDS), atol=1e-6)


def test_corrections_become_weights_of_the_minibatches(rng):
    whole = rows(rng)
    found, metrics = judged(whole, correction="token_tis", high=1.1)
    expected, cut = corrections.weights(
        "token_tis", whole.old_logp, whole.sampler_logp, MASK, high=1.1
    )
    np.testing.assert_array_equal(np.concatenate([half.weights for half in found]), expected)
    assert 0 < float(metrics["correction/cut"]) == float(cut["correction/cut"]) < 1
    assert judged(whole)[0][0].weights is None


def test_taken_rows_without_a_signal_count_nowhere(rng):
    """Groups pass from one scored part to another; what is masked keeps its place only."""
    whole = rows(rng)
    parts = minibatches.split_rows(whole, 4)
    picked, signal = advantages.informative(REWARDS, 2, 3)
    np.testing.assert_array_equal(picked, [0, 1, 2, 3, 4, 5])
    taken = minibatches.select_rows(parts, picked, signal)
    np.testing.assert_array_equal(taken.old_logp, whole.old_logp[picked])
    np.testing.assert_array_equal(taken.mask[:4], MASK[:4])
    assert not np.any(taken.mask[4:])


def test_metrics_are_of_the_rows_that_count(rng):
    """Rows without a signal would pull the mean KL to 0; of none at all there is no mean."""
    whole = rows(rng)
    some = whole.replace(mask=MASK & (np.arange(8) < 4)[:, None])
    d = np.where(some.mask, whole.old_logp - whole.ref_logp, 0).sum(-1)
    controls = {"correction": "token_tis", "high": 1.1}
    _, metrics = judged(some, 0.3, **controls)
    assert float(metrics["reward/kl"]) == pytest.approx(d[:4].mean(), abs=1e-6)
    _, metrics = judged(whole.replace(mask=np.zeros_like(MASK)), 0.3, **controls)
    assert set(metrics) > {"reward/kl", "correction/cut"}
    assert np.isnan(list(metrics.values())).all()
