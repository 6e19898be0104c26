"""The product inside a feed-forward layer."""

import jax
import numpy as np

from sapo_jax.model.swiglu import swiglu


def test_the_backward_pass_keeps_the_factors_alone(rng):
    """And its gradient is that of the formula, in float64."""
    gate, up, change = rng.normal(size=(3, 5, 7)).astype(np.float32)
    found, pull = jax.vjp(swiglu, gate, up)
    kept = [x for x in jax.tree.leaves(pull) if np.ndim(x)]
    assert len(kept) == 2
    assert all(any(np.array_equal(x, factor) for x in kept) for factor in (gate, up))
    g, u, d = (x.astype(np.float64) for x in (gate, up, change))
    sigmoid = 1 / (1 + np.exp(-g))
    expected = d * u * sigmoid * (1 + g * (1 - sigmoid)), d * g * sigmoid
    np.testing.assert_allclose(found, g * sigmoid * u, rtol=1e-5, atol=1e-6)
    for own, reference in zip(pull(change), expected, strict=True):
        np.testing.assert_allclose(own, reference, rtol=1e-5, atol=1e-6)
