"""Advantages against closed forms; groups without signal are exactly zero."""

import numpy as np
import pytest

from sapo_jax import advantages


def test_group_matches_numpy(rng):
    rewards = rng.uniform(size=24).astype(np.float32)
    groups = rewards.reshape(6, 4)
    for ddof in (0, 1):
        std = groups.std(-1, ddof=ddof, keepdims=True)
        expected = ((groups - groups.mean(-1, keepdims=True)) / (std + 1e-6)).ravel()
        np.testing.assert_allclose(advantages.group(rewards, 4, ddof=ddof), expected, rtol=1e-4)


def test_leave_one_out_matches_its_definition(rng):
    rewards = rng.uniform(size=12).astype(np.float32)
    expected = [
        r - np.mean(np.delete(group, i))
        for group in rewards.reshape(3, 4)
        for i, r in enumerate(group)
    ]
    np.testing.assert_allclose(advantages.leave_one_out(rewards, 4), expected, atol=1e-6)


def test_mean_subtracts_the_mean_only():
    got = advantages.mean(np.array([1, 0, 0, 0, 1, 1, 1, 0], np.float32), 4)
    np.testing.assert_allclose(got, [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75])


@pytest.mark.parametrize("estimator", sorted(advantages.ESTIMATORS))
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e6])
def test_equal_rewards_give_exactly_zero(estimator, value):
    """The f32 standard deviation of eight 0.1s is 8e-9: dividing by it gives |A| up to 0.8."""
    rewards = np.full(16, value, np.float32)
    assert not np.any(advantages.ESTIMATORS[estimator](rewards, 8))


@pytest.mark.parametrize("estimator", sorted(advantages.ESTIMATORS))
@pytest.mark.parametrize("rewards", [
    [0.1] * 16, [0.0, 1.0] * 8, [0.3, 0.30000003] * 8, [1.0] * 4 + [0.0] * 12
])  # fmt: skip
def test_advantages_are_continuous_in_a_penalty(estimator, rewards, rng):
    """A KL of 1e-5 nats, subtracted first, becomes |A| up to 1.5 in a group of equal rewards."""
    rewards, kl = np.float32(rewards), rng.uniform(-1, 1, 16).astype(np.float32)
    estimate = advantages.ESTIMATORS[estimator]
    without = np.asarray(estimate(rewards, 4))
    for coefficient in (1e-8, 1e-4, 1e-2):
        moved = np.asarray(estimate(rewards, 4, np.float32(coefficient) * kl)) - without
        assert 0 <= np.abs(moved).max() <= 6 * coefficient + 1e-6
    assert np.abs(moved).max() > 1e-3  # a penalty gives a signal where rewards are equal


def test_a_penalty_has_the_scale_of_the_rewards(rng):
    rewards, kl = rng.uniform(size=(2, 8)).astype(np.float32)
    centred = (x.reshape(2, 4) - x.reshape(2, 4).mean(-1, keepdims=True) for x in (rewards, kl))
    expected = [x / rewards.reshape(2, 4).std(-1, ddof=1, keepdims=True) for x in centred]
    got = advantages.group(rewards, 4, kl)
    np.testing.assert_allclose(got, (expected[0] - expected[1]).ravel(), rtol=1e-4, atol=1e-5)


def test_degenerate_groups_do_not_touch_the_others(rng):
    mixed = rng.integers(0, 2, 8).astype(np.float32)
    mixed[:2] = 0, 1
    both = np.concatenate([np.full(8, 0.1, np.float32), mixed])
    got = np.asarray(advantages.group(both, 8))
    assert not np.any(got[:8])
    np.testing.assert_array_equal(got[8:], advantages.group(mixed, 8))


def test_shifting_a_group_changes_nothing():
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 1.0], np.float32)
    for name in ("group", "leave_one_out", "mean"):
        estimator = advantages.ESTIMATORS[name]
        np.testing.assert_allclose(estimator(rewards + 4, 4), estimator(rewards, 4), atol=1e-5)


def test_reinforce_pp_whitens_the_valid_rows(rng):
    rewards = rng.uniform(size=10).astype(np.float32)
    valid = np.arange(10) < 7
    got = np.asarray(advantages.reinforce_pp(rewards, valid))
    assert not np.any(got[7:])
    assert got[:7].mean() == pytest.approx(0, abs=1e-6)
    assert got[:7].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("estimator", "size", "message"),
    [
        ("group", 1, "at least 2"), ("leave_one_out", 1, "at least 2"), ("mean", 1, "at least 2"),
        ("mean", 5, "groups of 5"),
    ],
)  # fmt: skip
def test_wrong_group_sizes_are_refused(estimator, size, message):
    with pytest.raises(ValueError, match=message):
        advantages.ESTIMATORS[estimator](np.zeros(8, np.float32), size)


def test_one_row_is_compared_with_none():
    with pytest.raises(ValueError, match="at least 2"):
        advantages.reinforce_pp(np.zeros(1, np.float32))


def test_informative_groups_come_first_and_keep_their_order():
    """Dynamic sampling: a fixed number of prompts, filled up with marked groups without signal."""
    rewards = np.float32([1, 1, 0, 1, 0, 0, 1, 0, 0.5, 0.25])
    rows, signal = advantages.informative(rewards, 2, 2)
    np.testing.assert_array_equal(rows, [2, 3, 6, 7])
    assert signal.all()
    rows, signal = advantages.informative(rewards, 2, 4)
    np.testing.assert_array_equal(rows, [2, 3, 6, 7, 8, 9, 0, 1])
    np.testing.assert_array_equal(signal, [True] * 6 + [False] * 2)
    with pytest.raises(ValueError, match="at least 6 groups of 2"):
        advantages.informative(rewards, 2, 6)
    with pytest.raises(ValueError, match="at least 2"):
        advantages.informative(rewards, 1, 4)  # a group of one never has a signal


@pytest.mark.parametrize("kept", range(7))
def test_informative_groups_are_spread_over_the_minibatches(kept, rng):
    """All at the front, they would leave the last minibatches of an iteration without a token."""
    with_signal = np.sort(rng.permutation(9)[:kept])
    rewards = np.zeros((9, 2), np.float32)
    rewards[with_signal, 0] = 1
    rows, signal = advantages.informative(rewards.ravel(), 2, 6, 3)
    groups, signal = rows[::2] // 2, signal[::2]
    assert len(set(groups)) == 6
    np.testing.assert_array_equal(groups[signal], with_signal)  # in their order
    each = signal.reshape(3, 2).sum(-1)
    assert each.max() - each.min() <= 1
    with pytest.raises(ValueError, match="must divide 6"):
        advantages.informative(rewards.ravel(), 2, 6, 4)
