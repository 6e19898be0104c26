"""Sampler corrections by hand, at their bounds, and where nothing may be divided or trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import corrections
from sapo_jax.objectives import policy_loss

RHO = np.float32([[0.2, 0.8, 1.5, 4.0], [6.0, 1.0, 1.0, 9.0]])
MASK = np.array([[True] * 4, [True, True, True, False]])
SAMPLER = np.float32([[-1.0, -0.3, -2.0, -0.7], [-3.0, -0.1, -1.0, -5.0]])
PRODUCT = [0.2 * 0.8 * 1.5 * 4.0, 6.0]  # 0.96: one sequence inside 2, one outside
GEOMETRIC = [0.96**0.25, 6 ** (1 / 3)]

BY_HAND = [
    ("token_tis", {}, [[0.2, 0.8, 1.5, 2.0], [2.0, 1.0, 1.0, 0]], 2 / 7),
    ("sequence_tis", {}, [[0.96] * 4, [2.0, 2.0, 2.0, 0]], 3 / 7),
    ("token_mis", {}, [[0.2, 0.8, 1.5, 0], [0, 1.0, 1.0, 0]], 2 / 7),
    ("sequence_mis", {}, [[0.96] * 4, [0, 0, 0, 0]], 3 / 7),
    ("sequence_mis", {"high": 7.0}, [[0.96] * 4, [6.0, 6.0, 6.0, 0]], 0),
    ("icepop", {}, [[0, 0.8, 1.5, 4.0], [0, 1.0, 1.0, 0]], 2 / 7),
    ("icepop", {"low": 0.1, "high": 1.2}, [[0.2, 0.8, 0, 0], [0, 1.0, 1.0, 0]], 3 / 7),
    ("geometric", {}, [[0] * 4, [0] * 4], 1),
    ("geometric", {"low": 0.98, "high": 1.02}, [[1.0] * 4, [0] * 4], 3 / 7),
]


@pytest.mark.parametrize(("name", "bounds", "expected", "cut"), BY_HAND)
def test_weights_by_hand(name, bounds, expected, cut):
    """The product for sequences and not the mean (that is GSPO's), which only rejection takes."""
    old = SAMPLER + np.log(RHO)
    found, metrics = corrections.weights(name, old, SAMPLER, MASK, **bounds)
    expected = np.float32(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(metrics["correction/cut"]) == pytest.approx(cut)
    kept = expected[MASK]
    assert float(metrics["correction/weight_mean"]) == pytest.approx(kept.mean(), rel=1e-5)
    share = kept.sum() ** 2 / (7 * (kept**2).sum()) if kept.any() else 0
    assert float(metrics["correction/ess"]) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("name", corrections.CORRECTIONS)
def test_equal_policies_are_left_alone(name):
    """ρ = 1: every weight is 1, nothing is cut, whatever stands at the pads."""
    old = np.where(MASK, SAMPLER, np.nan).astype(np.float32)
    found, metrics = corrections.weights(name, old, np.where(MASK, SAMPLER, -np.inf), MASK)
    np.testing.assert_array_equal(found, MASK.astype(np.float32))
    assert float(metrics["correction/cut"]) == 0
    assert float(metrics["correction/ess"]) == 1


@pytest.mark.parametrize("name", corrections.CORRECTIONS)
def test_extreme_ratios_stay_finite(name):
    """A sampler that gave a token probability 0 must not poison the batch."""
    old = np.float32([[0.0, -np.inf, -1e5, 300.0], [0, 0, 0, 0]])
    found, metrics = corrections.weights(name, old, np.float32([[-np.inf, 0, 0, 0], [0] * 4]), MASK)
    assert np.all(np.isfinite(found))
    assert all(np.isfinite(value) for value in metrics.values())
    nothing = corrections.weights(name, old, old, np.zeros_like(MASK))
    assert not np.any(nothing[0])
    assert float(nothing[1]["correction/ess"]) == 0


def test_packed_rows_are_their_sequences():
    """A product over the whole row would mix sequences that share it."""
    old, sampler = (np.concatenate(list(x))[None] for x in (SAMPLER + np.log(RHO), SAMPLER))
    segments, mask = np.repeat([1, 2], 4)[None], np.concatenate(list(MASK))[None]
    packed = corrections.weights("sequence_tis", old, sampler, mask, segments_BT=segments)[0]
    apart = corrections.weights("sequence_tis", SAMPLER + np.log(RHO), SAMPLER, MASK)[0]
    np.testing.assert_allclose(packed.reshape(2, 4), apart, rtol=1e-6)


def test_rejected_tokens_stay_in_the_denominator():
    """Halving what counts must halve the loss, not leave its mean as it was."""
    a = np.ones(2, np.float32)
    weights = corrections.weights("token_mis", SAMPLER + np.log(RHO), SAMPLER, MASK)[0]
    ones = (np.asarray(weights) > 0).astype(np.float32)
    whole, kept = (
        policy_loss("dapo", SAMPLER, SAMPLER, a, MASK, weights_BT=w)[0] for w in (None, ones)
    )
    assert float(kept) == pytest.approx(float(whole) * 5 / 7)


def test_no_gradient_and_one_executable():
    """Weights are constants of the objective; their bounds may be swept."""
    traces = []

    @jax.jit
    def total(old, high):
        traces.append(high)
        return jnp.sum(corrections.weights("token_tis", old, SAMPLER, MASK, high=high)[0])

    gradient = jax.grad(total)(SAMPLER + np.log(RHO), 2.0)
    assert not np.any(gradient)
    before = len(traces)
    assert float(total(SAMPLER + np.log(RHO), 2.0)) != float(total(SAMPLER + np.log(RHO), 3.0))
    assert len(traces) <= before + 1


WRONG = [
    (("tis",), {}, "token_tis"),
    (("token_tis",), {"low": 0.5}, "it has high"),
    (("icepop",), {"low": 5.0}, "low=5.0, high=5.0"),
    (("icepop",), {"low": -1.0}, "0 ≤ low"),
]


@pytest.mark.parametrize(("name", "bounds", "message"), WRONG)
def test_wrong_bounds_are_refused(name, bounds, message):
    with pytest.raises(ValueError, match=message):
        corrections.bounds_of(*name, **bounds)
