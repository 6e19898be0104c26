"""What holds for every objective: signs by quadrant, and finite numbers whatever comes in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax import objectives
from sapo_jax.objectives import OBJECTIVES, policy_loss, switch

NAMES = sorted(OBJECTIVES)
ROWS, WIDTH = 3, 4
EVERY = objectives.resolve(switch(NAMES), max_length=float(WIDTH), kl_coef=0.1)
FAR = 3.0  # ratios 1/3 and 3 are beyond every preset's bounds but CISPO's upper one


@functools.cache
def coefficients(name):
    """c of one token that is a whole completion: −∂loss/∂log π / A, of log-ratio and A."""
    old, one = jnp.full((1, 1), -1.3), jnp.ones((1, 1), bool)
    hp = {"kl_coef": 0.0, **({"max_length": 1.0} if name == "dr_grpo" else {})}

    @jax.jit
    def value(log_ratio, advantage):
        def loss(x):
            return policy_loss(name, x, old, jnp.full(1, advantage), one, **hp)[0]

        return -jax.grad(loss)(old + log_ratio)[0, 0] / advantage

    return value


def coefficient(name, log_ratio, advantage):
    return float(coefficients(name)(log_ratio, advantage))


CLIPPED = {
    "grpo", "grpo_r2", "gspo", "gspo_token", "dapo", "dr_grpo", "ppo", "gmpo", "luspo",
    "dppo_tv", "dppo_kl", "cppo",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_signs_in_each_quadrant(name):
    """No gate may turn a gradient around; a clip silences only what moves away from r = 1.

    The two-sided clip, which also silences A > 0 at r ≪ 1, and the sign error in A < 0 are the
    mistakes that this excludes.
    """
    for advantage in (1.0, -0.5):
        for log_ratio in (np.log(FAR), -np.log(FAR)):
            c = coefficient(name, log_ratio, advantage)
            outward = advantage * log_ratio > 0
            where = f"A = {advantage}, r = {np.exp(log_ratio):.2f}"
            if name in CLIPPED and outward:
                assert c == 0, where
            else:
                assert c > 0, where
            w = c / np.exp(log_ratio)
            if name.startswith("sapo"):
                assert w < 1, where
            elif name in CLIPPED and not outward:
                assert w == pytest.approx(1, rel=1e-5), where
            elif name == "maspo":
                assert (w < 1) if outward else w == pytest.approx(1, rel=1e-5), where
        for log_ratio in (1e-4, -1e-4):  # inside every band, GSPO's too
            at_one = 0.26506221 if name == "mhpo" else 1.0
            assert coefficient(name, log_ratio, advantage) == pytest.approx(at_one, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_token_on_policy_counts_fully(name):
    """r = 1 gives c = 1: MHPO's 0.265 is a smaller learning rate in disguise."""
    for advantage in (1.0, -0.5):
        expected = 0.26506221 if name == "mhpo" else 1.0
        assert coefficient(name, 0.0, advantage) == pytest.approx(expected, rel=1e-6)


def test_sapo_is_the_tanh_gate_of_half_the_temperature():
    """tanh(τ) ≡ sigmoid(2τ): tanh(τ(r − 1))/τ has the derivative of SAPO's gate at 2τ."""
    tau = 0.7
    hp = {"tau_pos": 2 * tau, "tau_neg": 2 * tau}
    old, one = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)

    def surrogate(log_ratio):
        return -policy_loss("sapo", log_ratio, old, jnp.ones(1), one, **hp)[0]

    for r in (0.3, 1.0, 1.9, 4.0):
        expected = jax.grad(lambda x: jnp.tanh(tau * (x - 1)) / tau)(r)
        c = jax.grad(surrogate)(jnp.full((1, 1), np.log(r), jnp.float32))
        assert float(c[0, 0]) / r == pytest.approx(float(expected), rel=1e-5)


@jax.jit
def loss_metrics_gradient(index, logp, old, ref, advantages, mask, weights):
    """Every preset in one executable."""

    def loss(x):
        objective = objectives.resolve(EVERY, index=index)
        more = {"ref_logp_BT": ref, "weights_BT": weights}
        return policy_loss(objective, x, old, advantages, mask, **more)

    return jax.value_and_grad(loss, has_aux=True)(logp)


# log-probabilities: ordinary, tiny, beyond exp()'s range in f32, and none at all
LOGP = st.one_of(
    st.floats(-20, 0, width=32), st.sampled_from([0.0, -1e-30, -88.0, -104.0, -1e5, -np.inf])
)
SIGNAL = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([0.0, 1e-20, -1e-20, 1e3]))
WEIGHT = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def array(elements, *shape):
    size = int(np.prod(shape))
    flat = st.lists(elements, min_size=size, max_size=size)
    return flat.map(lambda x: np.float32(x).reshape(shape))


BATCHES = st.tuples(
    *[array(LOGP, ROWS, WIDTH) for _ in range(3)],
    array(SIGNAL, ROWS),
    array(st.integers(0, WIDTH), ROWS),  # lengths: an empty row, a single token, no padding
    array(st.booleans(), ROWS, WIDTH),  # holes
    array(WEIGHT, ROWS, WIDTH),
    st.sampled_from([np.nan, np.inf, 0.0]),  # what stands at the pads
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BATCHES)
def test_loss_and_gradient_are_finite_for_every_preset(batch):
    """exp overflows in f32 from 89, 0·∞ is NaN, an empty row has no denominator."""
    logp, old, ref, advantages, length, kept, weights, fill = batch
    mask = (np.arange(WIDTH) < length[:, None]) & (kept > 0)
    logp, old, ref = (np.where(mask, x, np.float32(fill)) for x in (logp, old, ref))
    for index, name in enumerate(NAMES):
        (loss, metrics), gradient = loss_metrics_gradient(
            index, logp, old, ref, advantages, mask, weights
        )
        assert np.isfinite(loss), name
        assert np.all(np.isfinite(gradient)), name
        assert not np.any(np.asarray(gradient)[~mask]), name
        if mask.any():
            wrong = {k: float(v) for k, v in metrics.items() if not np.isfinite(v)}
            assert not wrong, (name, wrong)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(array(st.floats(-6, 6, width=32), ROWS, WIDTH), array(SIGNAL, ROWS))
def test_gradients_never_turn_around(log_ratio, advantages):
    """Ascent on a token's surrogate raises log π where A > 0, for token ratios of any size."""
    tokens = [i for i, name in enumerate(NAMES) if OBJECTIVES[name].ratio == "token"]
    old, mask = np.full((ROWS, WIDTH), -2.0, np.float32), np.ones((ROWS, WIDTH), bool)
    ones = np.ones_like(old)
    logp = old + log_ratio
    for index in tokens:
        plain = np.where(mask, logp, 0)  # the reference is the policy: its KL has no gradient
        (_, _), gradient = loss_metrics_gradient(index, logp, old, plain, advantages, mask, ones)
        if NAMES[index] != "p3o":  # whose KL to the old policy pulls back
            assert np.all(np.asarray(gradient) * advantages[:, None] <= 0), NAMES[index]
