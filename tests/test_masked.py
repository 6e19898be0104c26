"""Masked reductions: what is masked out contributes nothing, not even NaN, not even a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import masked
from sapo_jax.types import Histogram, Max, Min, Weighted, merge


def test_nothing_counted_is_zero_with_zero_gradient():
    grad = jax.grad(lambda x: masked.ratio(Weighted(x * 3, jnp.float32(0))))(1.0)
    assert masked.ratio(Weighted(jnp.float32(5), jnp.float32(0))) == 0
    assert grad == 0


def test_nan_under_the_mask_is_harmless():
    values = jnp.array([[1.0, 2.0, jnp.nan]])
    mask = jnp.array([[True, True, False]])
    loss, grad = jax.value_and_grad(lambda x: masked.ratio(masked.mean(x, mask)))(values)
    assert loss == 1.5
    np.testing.assert_array_equal(grad, [[0.5, 0.5, 0]])


def test_segments_reduce_like_separate_rows(rng):
    values = rng.normal(size=(2, 6)).astype(np.float32)
    mask = rng.uniform(size=(2, 6)) < 0.7
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    total = np.asarray(masked.sequence_sum(values, mask, segments))
    mean = np.asarray(masked.sequence_mean(values, mask, segments))
    count = 0
    for row in range(2):
        for segment in set(segments[row]):
            inside = segments[row] == segment
            chosen = values[row][inside & mask[row]]
            np.testing.assert_allclose(total[row][inside], chosen.sum(), atol=1e-6)
            expected = chosen.mean() if chosen.size else 0
            np.testing.assert_allclose(mean[row][inside], expected, atol=1e-6)
            count += chosen.size > 0
    assert masked.sequence_count(mask, segments) == count


def test_rows_without_segments_are_one_sequence_each(rng):
    values = rng.normal(size=(3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    ones = np.ones((3, 4), int)
    for reduce in (masked.sequence_sum, masked.sequence_mean):
        np.testing.assert_allclose(
            reduce(values, mask), reduce(values, mask, ones), rtol=1e-6, atol=1e-7
        )
    assert masked.sequence_count(mask) == 2


def test_reductions_merge():
    stacked = {
        "mean": Weighted(jnp.array([1.0, 5.0]), jnp.array([1.0, 3.0])),
        "max": Max(jnp.array([1.0, 7.0])),
        "min": Min(jnp.array([1.0, 7.0])),
        "histogram": Histogram(jnp.array([[1.0, 0], [2, 3]]), jnp.array([[0.0, 1, 2]] * 2)),
    }
    merged = merge(stacked)
    assert masked.ratio(merged["mean"]) == 1.5  # not the mean of the means, 4/3
    assert merged["max"].value == 7
    assert merged["min"].value == 1
    np.testing.assert_array_equal(merged["histogram"].counts, [3, 3])
    np.testing.assert_array_equal(merged["histogram"].edges, [0, 1, 2])
