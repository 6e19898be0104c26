"""Attention kernels of TPU (interpreted on CPU) and GPU (by XLA) against the plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.model import attention, splash


@pytest.mark.parametrize(
    "kernel",
    [partial(splash.causal, interpret=True), partial(attention.fused, implementation="xla")],
    ids=["splash", "fused"],
)
def test_values_and_gradients_are_those_of_xla(kernel, rng):
    """Padding to tiles, grouped heads, two segments and pads: none may leak into another."""
    b, s, h, k, d = 2, 20, 4, 2, 16
    q = rng.normal(size=(b, s, h, d)).astype(np.float32)
    keys, values = rng.normal(size=(2, b, s, k, d)).astype(np.float32)
    segments = np.ones((b, s), np.int32)
    segments[0, 8:], segments[1, 15:] = (2 if kernel.func is splash.causal else 0), 0
    weight = rng.normal(size=(b, s, h, d)).astype(np.float32) * (segments > 0)[..., None, None]

    def total(function):
        return lambda *x: (jnp.sum(function(*x, segments) * weight), function(*x, segments))

    def run(function):
        wrt = jax.jit(jax.value_and_grad(total(function), argnums=(0, 1, 2), has_aux=True))
        (_, out), grads = wrt(q, keys, values)
        return out * (segments > 0)[..., None, None], *grads

    for got, want in zip(run(kernel), run(partial(attention.causal, kernel="xla")), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
