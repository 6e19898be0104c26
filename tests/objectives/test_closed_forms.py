"""Every preset against its closed form in NumPy, by value and by gradient, with its defaults."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.objectives import OBJECTIVES, policy_loss

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
    if name in ("reinforce", "cispo", "vespo"):  # A · sg(c) · log π
        w = np.exp(ell.sum(-1, keepdims=True))
        k, rate = np.where(a > 0, 2, 3), np.where(a > 0, 3, 2)
        c = {"reinforce": np.ones_like(r), "cispo": np.clip(r, 0, 5),
             "vespo": np.exp(rate) * w**k * np.exp(-rate * w)}[name]  # fmt: skip
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
            math.sqrt(2) - 1, lambda u: u / (1 + abs(u)), lambda u: 1 / (1 + abs(u)) ** 2
        )(r, a),
        "grpo": lambda: clip(0.2, 0.2)(r, a),
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
    each = {"dr_grpo": LENGTH, "luspo": 1.0}.get(name, length)
    return mask / (each * sequences)


@pytest.mark.parametrize("spread", [0.4, 4e-4], ids=["far", "near"])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
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
        given = [jnp.asarray(x) for x in (logp, old, a, mask)]
        loss, grad = jax.value_and_grad(
            lambda x: policy_loss(name, x, *given[1:], **hp)[0]
        )(given[0])  # fmt: skip
        assert grad.dtype == dtype
    value, slope = closed(name, *(x.astype(np.float64) for x in (logp, old, a)), mask)
    weight = share(name, mask)
    np.testing.assert_allclose(loss, -np.sum(weight * value), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(grad, -weight * slope, rtol=tolerance, atol=tolerance)
