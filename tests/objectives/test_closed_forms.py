"""Every preset against its closed form in NumPy, by value and by gradient, with its defaults."""

import math

import jax
import numpy as np
import pytest

from sapo_jax import objectives
from sapo_jax.objectives import OBJECTIVES
from tests.objectives.programs import of_each_token, value_and_gradient

LENGTH = 9.0
erf = np.vectorize(math.erf)
HALF = 2 * math.acosh(math.sqrt(2))  # |r − 1| at which SAPO's gate with τ = 1 is ½


def sech2(x):
    return 1 / np.cosh(x) ** 2


def sapo(r, a, tau_pos=1.0, tau_neg=1.05):
    tau = np.where(a > 0, tau_pos, tau_neg)
    return 4 / tau / (1 + np.exp(-tau * (r - 1))), r * sech2(tau * (r - 1) / 2)


def soft(half_width, value, weight):
    """A smooth gate of the half-width of SAPO's; at κ = 1 that is ``half_width``."""

    def gate(r, a):
        kappa = np.where(a > 0, 1.0, 1.05) * half_width / HALF
        u = kappa * (r - 1)
        return value(u) / kappa, r * weight(u)

    return gate


def quadrant(r, a, pos=(1.0, 1.0), neg=(1.05, 1.05)):
    below, above = (np.where(a > 0, p, n) for p, n in zip(pos, neg, strict=True))
    tau = np.where(r < 1, below, above)
    f = 4 / tau * (1 / (1 + np.exp(-tau * (r - 1))) - 0.5) + 2 / above
    return f, r * sech2(tau * (r - 1) / 2)


def masked_by(divergence, bound):
    """r where the update moves towards r = 1, or the token's divergence is within the bound."""

    def gate(r, a, logp, old):
        p, q = np.exp(old), np.exp(logp)
        d = {
            "tv": abs(q - p),
            "kl": p * np.log(p / q) + (1 - p) * np.log((1 - p + 1e-8) / (1 - q + 1e-8)),
        }[divergence]
        kept = (a * (r - 1) <= 0) | (d <= bound)
        return r * kept, r * kept

    return gate


def cppo(r, a, logp, old, mask, delta=0.15, delta_prefix=0.015, w_min=0.8):
    """Algorithm 1 of arXiv 2606.10968, token by token."""
    kept = np.zeros(r.shape, bool)
    for i, row in enumerate(mask):
        places, total, weights = np.flatnonzero(row), 0.0, 0.0
        for n, t in enumerate(places):
            w = 1 - (1 - w_min) / max(1, len(places) - 1) * n
            z = w * abs(np.exp(logp[i, t]) - np.exp(old[i, t]))
            bound = min(delta, delta + delta_prefix * weights - total)
            kept[i, t] = a[i, t] * (r[i, t] - 1) <= 0 or z <= bound
            total, weights = total + z, weights + w
    return r * kept, r * kept


def clip(low, high):
    def gate(r, a):
        inside = np.where(a > 0, r <= 1 + high, r >= 1 - low)
        return np.where(inside, r, np.where(a > 0, 1 + high, 1 - low)), r * inside

    return gate


def maspo(r, a, old):
    width = np.clip(np.exp(-0.3 * old), 1, 10)
    width = width * np.clip(np.where(a > 0, 1 + 0.03 * a, 1 / (1 - 0.03 * a)), 0.1, 10)
    outward = np.where(a > 0, r > 1, r < 1)
    c = r * np.where(outward, np.exp(-((r - 1) ** 2) / (2 * width**2)), 1)
    return c, c


def mhpo(r, a, scale=1.0):
    psi = 1.5 * np.tanh(np.log(r) / 1.5)
    zeta = np.log1p(np.exp(psi)) ** 1.5 + (np.log1p(np.exp(-psi)) / 0.8) ** 2
    value = scale * np.exp(psi - zeta)
    return value, value * sech2(np.log(r) / 1.5)


def closed(name, logp, old, a, mask):
    """The objective of each token and its derivative in log π, f64[B, T] each."""
    ell = np.where(mask, logp - old, 0)
    length = np.maximum(mask.sum(-1, keepdims=True), 1)
    a = np.broadcast_to(a[:, None], ell.shape)
    r, s = np.exp(ell), np.exp(np.broadcast_to(ell.sum(-1, keepdims=True) / length, ell.shape))
    if name in ("reinforce", "cispo", "vespo", "topr"):  # A · sg(c) · log π
        w = np.exp(ell.sum(-1, keepdims=True))
        k, rate = np.where(a > 0, 2, 3), np.where(a > 0, 3, 2)
        c = {"reinforce": np.ones_like(r), "cispo": np.clip(r, 0, 5),
             "vespo": np.exp(rate) * w**k * np.exp(-rate * w),
             "topr": np.where(a > 0, 1, np.minimum(w, 1))}[name]  # fmt: skip
        return c * a * logp, c * a
    if name == "gmpo":
        kept = np.where(a > 0, ell <= 0.4, ell >= -0.4)
        clipped = np.where(kept, ell, np.where(a > 0, 0.4, -0.4)) * mask
        rho = np.exp(clipped.sum(-1, keepdims=True) / length)
        return rho * a, rho * kept * a
    if name == "p3o":
        f, c = sapo(r, a, 4.0, 4.0)
        return f * a - 0.1 * (r - 1 - ell), c * a - 0.1 * (r - 1)
    at_one = np.exp(-(np.log(2) ** 1.5) - (np.log(2) / 0.8) ** 2)
    f, c = {
        "sapo": lambda: sapo(r, a),
        "sapo_erf": lambda: soft(
            math.sqrt(math.log(2)), lambda u: math.sqrt(math.pi) / 2 * erf(u),
            lambda u: np.exp(-u * u),
        )(r, a),
        "sapo_arctan": lambda: soft(1, np.arctan, lambda u: 1 / (1 + u * u))(r, a),
        "sapo_softsign": lambda: soft(
            math.sqrt(2 ** (2 / 3) - 1), lambda u: u / np.sqrt(1 + u * u),
            lambda u: (1 + u * u) ** -1.5,
        )(r, a),
        "sapo_quadrant": lambda: quadrant(r, a),
        "sapo_sequence": lambda: sapo(s, a),
        "sapo_softsign_abs": lambda: soft(
            math.sqrt(2) - 1, lambda u: u / (1 + abs(u)), lambda u: 1 / (1 + abs(u)) ** 2
        )(r, a),
        "grpo": lambda: clip(0.2, 0.2)(r, a),
        "grpo_r2": lambda: clip(0.2, 0.27)(r, a),
        "dppo_tv": lambda: masked_by("tv", 0.15)(r, a, logp, old),
        "dppo_kl": lambda: masked_by("kl", 0.05)(r, a, logp, old),
        "cppo": lambda: cppo(r, a, logp, old, mask),
        "dr_grpo": lambda: clip(0.2, 0.2)(r, a),
        "ppo": lambda: clip(0.2, 0.2)(r, a),
        "dapo": lambda: clip(0.2, 0.28)(r, a),
        "gspo": lambda: clip(3e-4, 4e-4)(s, a),
        "gspo_token": lambda: clip(3e-4, 4e-4)(s, a),
        "luspo": lambda: clip(3e-4, 4e-4)(s, a),
        "maspo": lambda: maspo(r, a, old),
        "mhpo": lambda: mhpo(r, a),
        "mhpo_unit": lambda: mhpo(r, a, 1 / at_one),
    }[name]()  # fmt: skip
    return f * a, c * a


TOKEN_MEAN = ("dapo", "ppo", "cispo", "maspo", "vespo")


def share(name, mask):
    """What a token counts for in the loss."""
    length = np.maximum(mask.sum(-1, keepdims=True), 1)
    sequences = (mask.sum(-1) > 0).sum()
    if name in TOKEN_MEAN:
        return mask / mask.sum()
    summed = dict.fromkeys(("luspo", "dppo_tv", "dppo_kl", "cppo"), 1.0)
    each = ({"dr_grpo": LENGTH} | summed).get(name, length)
    return mask / (each * sequences)


@pytest.mark.parametrize("spread", [0.4, 4e-4], ids=["far", "near"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param("float32", 1e-6, marks=pytest.mark.slow), ("float64", 1e-12)],
)
def test_value_and_gradient_are_the_closed_form(name, dtype, tolerance, spread):
    """Ratios on both sides of every bound (of GSPO's where they are near 1), holes, empty rows."""
    rng = np.random.default_rng(2)
    logp = rng.normal(-1.5, 0.6, (6, 9)).astype(dtype)
    old = (logp + spread * rng.standard_normal(logp.shape)).astype(dtype)
    a = rng.normal(size=6).astype(dtype)
    mask = np.arange(9) < np.array([9, 4, 1, 0, 7, 5])[:, None]
    mask[0, 3] = False
    hp = {"max_length": LENGTH} if name == "dr_grpo" else {}
    with jax.enable_x64(dtype == "float64"):
        objective = objectives.resolve(name, **hp)
        (loss, _), grad = value_and_gradient(objective, logp, old, a, mask)
        assert grad.dtype == dtype
    value, slope = closed(name, *(x.astype(np.float64) for x in (logp, old, a)), mask)
    weight = share(name, mask)
    np.testing.assert_allclose(loss, -np.sum(weight * value), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(grad, -weight * slope, rtol=tolerance, atol=tolerance)


def on_grid(name, r, sign, **hp):
    """f(r) and w(r) of single tokens, f64 each, from the loss and its gradient."""
    with jax.enable_x64(True):
        logp = np.log(r)[:, None]
        (loss, _), gradient = of_each_token(
            objectives.resolve(name, **hp), logp, 0 * logp, np.full(1, sign), np.ones((1, 1), bool)
        )
        return -sign * np.asarray(loss), -sign * np.asarray(gradient)[:, 0, 0] / r


def test_quadrants_have_their_own_temperatures():
    """Each side and sign has the slope of its own τ, and both sides meet at r = 1."""
    own = {"pos": (0.7, 2.0), "neg": (1.3, 3.0)}
    sides = ("below", "above")
    hp = {f"tau_{sign}_{side}": own[sign][i] for sign in own for i, side in enumerate(sides)}
    r = np.array([0.2, 0.7, 1 - 1e-9, 1 + 1e-9, 1.4, 3.0])
    for sign in (1.0, -1.0):
        found, (f, c) = on_grid("sapo_quadrant", r, sign, **hp), quadrant(r, sign, *own.values())
        np.testing.assert_allclose(found, (f, c / r), rtol=1e-12)
        assert abs(found[0][2] - found[0][3]) < 1e-8


def test_the_gates_of_the_study_in_its_own_units():
    """arXiv 2602.19345 writes w of erf as e^{−τ²(r−1)²/2}, of softsign as (1+τ²(r−1)²)^{−3/2}: its
    best, τ = 10, is ours times these factors.
    """
    r = np.linspace(0.7, 1.4, 15)
    theirs = {
        "sapo": (1.0, lambda u: sech2(u / 2)),
        "sapo_erf": (HALF / math.sqrt(2 * math.log(2)), lambda u: np.exp(-u * u / 2)),
        "sapo_arctan": (HALF, lambda u: 1 / (1 + u * u)),
        "sapo_softsign": (HALF / math.sqrt(2 ** (2 / 3) - 1), lambda u: (1 + u * u) ** -1.5),
    }
    assert [round(factor, 3) for factor, _ in theirs.values()] == [1.0, 1.497, 1.763, 2.3]
    for name, (factor, weight) in theirs.items():
        _, w = on_grid(name, r, 1.0, tau_pos=10 * factor)
        np.testing.assert_allclose(w, weight(10 * (r - 1)), rtol=1e-12)
