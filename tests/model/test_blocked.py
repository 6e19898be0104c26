"""Attention by blocks against the scores of whole rows: values, gradients, what is hidden."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.model import attention, blocked, flash

XLA = partial(attention.causal, kernel="xla")
SMALL = flash.Tiles(32, 16, warps=4, stages=1)
FLASH = flash.Kernels(SMALL, SMALL, SMALL._replace(queries=16, keys=32))


def rows(kind: str, s: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Segments and prefixes of two rows of s tokens, some of them pads."""
    third = s // 3
    if kind == "one":
        segments = np.ones((2, s), np.int32)
        segments[1, s // 2 :] = 0
        return segments, None
    segments = np.repeat([[1, 2, 3, 4]], [third, third, third, s - 3 * third], 1)
    segments = np.concatenate([segments, segments[:, ::-1].max() + 1 - segments[:, ::-1]])
    segments[0, -3:] = 0
    return segments, np.where(np.isin(segments, (2, 3)), 1, 0) if kind == "prefix" else None


@pytest.mark.parametrize("kind", ["one", "packed", "prefix"])
@pytest.mark.parametrize("s", [12, 150, 300])  # one block; two; three
def test_values_and_gradients_are_those_of_whole_rows(kind, s, rng):
    compare(blocked.causal, kind, s, rng)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("one", "packed")), "prefix"]
)
def test_those_of_the_gpu_kernel_are_too(kind, rng):
    compare(partial(flash.causal, kernels=FLASH, interpret=True), kind, 300, rng)


def compare(kernel, kind, s, rng):
    h, k, d = 4, 2, 16
    segments, prefix = rows(kind, s)
    q, weight = rng.normal(size=(2, 2, s, h, d)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, s, k, d)).astype(np.float32)
    weight *= (segments > 0)[..., None, None]

    def run(function):
        def total(*x):
            out = function(*x, segments, prefix_BS=prefix)
            return jnp.sum(out * weight), out

        wrt = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
        (_, out), grads = wrt(q, keys, values)
        return out * (segments > 0)[..., None, None], *grads

    for got, want in zip(run(kernel), run(XLA), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_pads_see_nothing_and_give_nothing(rng):
    segments = np.zeros((1, 12), np.int32)
    segments[0, :5] = 1
    q, k, v = (rng.normal(size=(1, 12, 2, 4)).astype(np.float32) for _ in range(3))
    out, pull = jax.vjp(lambda *x: blocked.causal(*x, segments), q, k, v)
    assert not np.any(out[0, 5:])
    for grad in pull(np.ones_like(out)):
        assert np.isfinite(grad).all()
        assert not np.any(grad[0, 5:])


def test_only_blocks_with_something_to_see_are_visited():
    """Segments of a block each: it visits itself, and the prefix where there is one."""
    n, b = 8, 16
    segments = np.repeat(np.arange(1, n + 1), b)[None]
    prefix = np.where(segments > 1, 1, 0)
    kv = np.zeros((1, n, b, 1, 1), np.float32)

    def counts(prefix):
        by_block = (x.reshape(1, n, b) for x in (segments, prefix))
        visits = blocked._visits(blocked.Rows(kv[..., None], kv, kv, *map(jnp.asarray, by_block)))
        return np.asarray(visits[1]).tolist()

    assert counts(np.zeros_like(prefix)) == [1] * n
    assert counts(prefix) == [1] + [2] * (n - 1)


def test_no_scores_of_whole_rows_exist():
    """At S = 2048, a block's scores and not [B, H, S, S]: in the forward and the backward pass."""
    b, s, h, d = 2, 2048, 4, 16
    x = jax.ShapeDtypeStruct((b, s, h, d), jnp.float32)
    segments = np.ones((b, s), np.int32)
    grad = jax.jit(jax.grad(lambda q, k, v: jnp.sum(blocked.causal(q, k, v, segments)), (0, 1, 2)))
    used = grad.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert used < b * h * s * s * 4 / 8
