"""Var_i, D_i, their bound, EUR, ESS and quantiles against NumPy in float64, from the formulas."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import diagnostics
from sapo_jax.types import Histogram

TOY = json.loads((pathlib.Path(__file__).parent / "goldens/gates.json").read_text())["toy"]


def by_hand(z, tau):
    """Of one sequence: Var, D of the gate on log r, D of the gate in use, the bound."""

    def g(x):
        return 1 / np.cosh(tau * x / 2) ** 2

    variance = np.mean((z - z.mean()) ** 2)
    d_log, d_gate = (abs(np.mean(g(x)) - g(z.mean())) for x in (z, np.exp(z) - 1))
    return variance, d_log, d_gate, tau**2 / 4 * variance


def test_the_toy_has_its_golden_values():
    """The second row's gate in use breaks the bound of the gate on log r; D_log never does."""
    given = TOY["inputs"]
    mask = np.array(given["mask"]) > 0
    with jax.enable_x64(True):
        tau = jnp.array([1.0, 1.05])
        found = diagnostics.sequence_statistics(np.array(given["log_ratio"]), mask, tau)
    expected = ([0.1125, 0.030625], [0.02579054, 0.00825092], [0.05176942, 0.00521229])
    np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 2.0])
def test_statistics_of_sequences_are_those_by_hand(rng, spread, dtype, tolerance):
    """Rows of any length, holes, NaN at pads, and the same sequences packed into one row.

    g near 1 would have lost all digits of D at a spread of 1e-3 in f32.
    """
    length = np.array([9, 4, 1, 0, 7, 5])
    mask = np.arange(9) < length[:, None]
    mask[0, 3] = False
    z = np.where(mask, spread * rng.standard_normal(mask.shape), np.nan).astype(dtype)
    tau = np.array([1.0, 1.05, 1.0, 1.05, 2.0, 0.5])
    rows = [z[i][mask[i]].astype(np.float64) for i in range(6)]
    each = zip(rows, tau, strict=True)
    expected = np.array([by_hand(r, t) if len(r) else np.zeros(4) for r, t in each])
    with jax.enable_x64(dtype == "float64"):
        tau_B1 = jnp.asarray(tau, dtype)[:, None]
        plain = diagnostics.sequences(jnp.asarray(z), jnp.asarray(mask), tau_B1)
        api = diagnostics.sequence_statistics(z, mask, jnp.asarray(tau, dtype))
        segments = jnp.repeat(jnp.arange(1, 7), 9)[None]
        packed = [jnp.asarray(x.reshape(1, -1)) for x in (z, mask)]
        by_id = diagnostics.sequences(*packed, jnp.repeat(tau_B1, 9)[None], segments)
        plain, api, by_id = jax.tree.map(np.asarray, (plain, api, by_id))
    np.testing.assert_array_equal(plain.tokens, mask.sum(-1))
    for found in (plain, [x[0, 1:7] for x in by_id]):
        for column, value in zip(found[1:], expected.T, strict=True):
            np.testing.assert_allclose(column, value, rtol=tolerance, atol=1e-13)
    np.testing.assert_array_equal(api, plain[1:4])
    np.testing.assert_array_less(plain.d_log, plain.bound * (1 + 1e-4) + 1e-12)


def test_quantiles_are_within_their_bin():
    counts, edges = jnp.array([1.0, 0, 4, 5]), jnp.array([0.0, 1, 2, 4, 8])
    for share, expected in ((0.1, 1), (0.3, 3), (0.5, 4), (0.75, 6), (1.0, 8), (0.0, 0)):
        assert float(diagnostics.quantile(Histogram(counts, edges), share)) == expected
    assert np.isnan(diagnostics.quantile(Histogram(0 * counts, edges), 0.5))
