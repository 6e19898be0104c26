"""Metrics of a minibatch against NumPy in float64, however its rows are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, objectives
from sapo_jax.learner import diagnostics
from sapo_jax.masked import finish
from sapo_jax.types import Batch, Histogram
from tests.fakes import VOCAB

GROUPS, G, N, T = 4, 4, 3, 8
B, S = GROUPS * G, N + T
TAUS = {"sapo": (1.0, 3.0), "grpo": (1.0, 1.05)}
REWARDS = np.float32([1, 0, 0, 0, 1, 1, 1, 1, 0.5, 0.25, 1, 0, 1, 1, 1, 0])  # one group is equal


@pytest.fixture
def batch(nano, rng):
    """Judged rows of a policy that has moved on by 0.3 nats a token; pads hold NaN."""
    completion = rng.integers(1, T + 1, B)[:, None]
    index = np.arange(S)
    mask = (index >= N) & (index < N + completion)
    tokens = rng.integers(2, VOCAB, (B, S))
    tokens[:, :N] = np.repeat(tokens[::G, :N], G, 0)
    exists = index < N + completion
    zero = np.zeros((B, S), np.float32)
    batch = Batch(
        np.where(exists, tokens, 0).astype(np.int32), mask, exists.astype(np.int32), zero, zero,
        np.zeros(B, np.float32),
    )  # fmt: skip
    logp = learner.score(nano[1], batch, hyperparameters(nano, 0))
    old = np.asarray(logp) - rng.normal(0, 0.3, (B, S)).astype(np.float32)
    batch = batch.replace(old_logp=np.where(mask, old, np.nan).astype(np.float32))
    made = {"estimator": "group", "group_size": G, "kl": "k1", "correction": "none", "parts": 1}
    ((batch,), _) = learner.make_minibatches(batch, jnp.asarray(REWARDS), 0.0, {}, **made)
    return jax.device_get(batch), np.where(mask, np.asarray(logp, np.float64), 0), completion[:, 0]


def hyperparameters(nano, index, **kw):
    objective = objectives.resolve(
        objectives.switch(["sapo", "grpo"]), index=index, **{"sapo.tau_neg": 3.0}
    )
    return learner.Hyperparameters(
        objective, 1e-3, 0.0, 1e9, 1.0, model=nano[0], head_chunk=16, **kw
    )


def by_hand(name, batch, logp):
    """All new metrics in float64, token by token and group by group."""
    mask, a = batch.mask, np.asarray(batch.advantages, np.float64)
    z = np.where(mask, logp - batch.old_logp, 0)
    r, a_BS = np.exp(z), a[:, None] * mask
    tau_B = np.where(a > 0, *TAUS[name])
    tau = np.broadcast_to(tau_B[:, None], z.shape)
    inside = np.where(a_BS > 0, r <= 1.2, r >= 0.8)
    w = inside if name == "grpo" else 1 / np.cosh(tau * (r - 1) / 2) ** 2
    found = {}
    for key, side in (("eur", a != 0), ("eur_pos", a > 0), ("eur_neg", a < 0)):
        prompts = []
        for start in range(0, B, G):
            rows = [i for i in range(start, start + G) if side[i]]
            if rows:
                prompts.append(np.concatenate([w[i][mask[i]] for i in rows]).mean())
        found[f"policy/{key}"] = np.mean(prompts)
    mass = np.abs(r * w * a_BS)
    for sign, of_sign in (("pos", a_BS > 0), ("neg", a_BS < 0)):
        for place, there in (("below", z < 0), ("above", z > 0)):
            found[f"coefficient/{sign}_{place}"] = mass[of_sign & there].sum() / mass.sum()
    found["ratio/ess"] = r[mask].sum() ** 2 / (mask.sum() * np.sum(r[mask] ** 2))
    rows = []
    for i in range(B):
        own, t = z[i][mask[i]], tau_B[i]
        g = lambda x, t=t: 1 / np.cosh(t * x / 2) ** 2  # noqa: E731
        at = g(own.mean())
        rows.append((np.var(own), abs(g(own).mean() - at), abs(g(np.exp(own) - 1).mean() - at)))
    var, d_log, d_gate = np.array(rows).T
    bound = tau_B**2 / 4 * var
    found |= {
        "ratio/var_mean": var.mean(), "ratio/d_log_mean": d_log.mean(),
        "ratio/d_gate_mean": d_gate.mean(), "ratio/bound_mean": bound.mean(),
        "ratio/bound_broken": np.mean(d_gate > bound),
    }  # fmt: skip
    quantiles = {
        "ratio/log": z[mask],
        "ratio/var": var,
        "ratio/d_log": d_log,
        "ratio/d_gate": d_gate,
    }
    return found, quantiles, r[mask]


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("rows", "micro-batches", "packed")),
        "shared prompts",
    ],
)
def test_metrics_are_those_by_hand(nano, batch, layout):
    """EUR by prompt and not by token, quadrants, ESS, Var_i, D_i, quantiles; GRPO's EUR is its
    unclipped share. A sequence that counts for what it shares a row with would show.
    """
    minibatch, logp, completion = batch
    kw, given = {"micro_batches": 4 if layout == "micro-batches" else 1}, minibatch
    if layout in ("packed", "shared prompts"):
        size = G if layout == "shared prompts" else 1
        shape = learner.packed_shape(B, N, T, group_size=size, budget=40)
        plan = learner.plan(np.full(B, N), completion, S, shape)
        given, kw = learner.pack(minibatch, plan), {"micro_batches": shape.micro_batches}
    gradient = jax.jit(learner.gradient)
    for index, name in enumerate(TAUS):
        _, terms = gradient(nano[1], given, hyperparameters(nano, index, **kw))
        _, found = finish(diagnostics.quantiles(terms))
        expected, quantiles, r = by_hand(name, minibatch, logp)
        assert 0 < expected["ratio/bound_broken"] < 1
        for key, value in expected.items():
            assert float(found[key]) == pytest.approx(value, rel=2e-5), (name, key)
        for key, values in quantiles.items():
            for share in diagnostics.QUANTILES[key]:
                low, high = np.quantile(values, share, method="inverted_cdf"), values.max()
                got = float(found[f"{key}_p{round(100 * share):02d}"])
                assert low - 0.05 * abs(low) <= got <= min(low + 0.05 * abs(low), 1.05 * high)
        counts = np.histogram(np.clip(r, 0.4, 1.5999), diagnostics.RATIO_EDGES)[0]
        np.testing.assert_array_equal(found["histogram/ratio"].counts, counts)


def test_without_prompts_every_sequence_is_one(nano, batch):
    """Batches that are made by hand, and demonstrations, have no groups."""
    minibatch, logp, _ = batch
    _, terms = jax.jit(learner.gradient)(
        nano[1], minibatch.replace(prompt_tokens=None), hyperparameters(nano, 1)
    )
    found = finish(terms)[1]
    a = np.asarray(minibatch.advantages)
    r = np.exp(np.where(minibatch.mask, logp - minibatch.old_logp, 0))
    inside = np.where(a[:, None] > 0, r <= 1.2, r >= 0.8)
    each = np.array([inside[i][minibatch.mask[i]].mean() for i in range(B)])
    for key, side in (("eur", a != 0), ("eur_pos", a > 0), ("eur_neg", a < 0)):
        assert float(found[f"policy/{key}"]) == pytest.approx(each[side].mean(), rel=1e-5)


def test_the_first_minibatch_stands_apart(nano, batch):
    """On-policy it would pull Var_i down and ESS up; it is in the list, by itself."""
    minibatch, logp, _ = batch
    first = minibatch.replace(old_logp=np.float32(logp))
    hp = hyperparameters(nano, 0).replace(learning_rate=0.0)
    for own in ((first, minibatch, minibatch), (minibatch,)):
        state = learner.init(jax.tree.map(jnp.copy, nano[1]), hp)
        _, record = learner.learn(state, own, hp)
        expected, _, r = by_hand("sapo", minibatch, logp)
        for key in ("ratio/var_mean", "ratio/ess", "coefficient/pos_above"):
            assert record[key] == pytest.approx(expected[key], rel=1e-4)
            assert record["minibatch"][-1][key] == pytest.approx(expected[key], rel=1e-4)
        assert sum(record["histogram/ratio"]["counts"]) == (len(own[1:]) or 1) * len(r)
    start = learner.init(jax.tree.map(jnp.copy, nano[1]), hp)
    _, record = learner.learn(start, (first, minibatch), hp)
    assert record["minibatch"][0]["ratio/var_mean"] < 1e-9
    assert record["minibatch"][0]["ratio/ess"] == pytest.approx(1, abs=1e-6)
    both = (record["minibatch"][i]["policy/eur"] for i in (0, 1))
    assert record["policy/eur"] == pytest.approx(np.mean([*both]), rel=1e-5)


def test_counts_for_quantiles_lie_in_their_bins(rng):
    """The bin is computed, not searched: each value is between the edges of the one it is in."""
    size = np.geomspace(1e-12, 1e4, 400) * rng.choice([-1, 1], 400)
    values = np.concatenate([size, [0.0]]).astype(np.float32)
    edges = diagnostics.QUANTILE_EDGES
    for value in values:
        found = diagnostics.for_quantiles(jnp.array([value]), jnp.ones(1, bool))
        (at,) = np.flatnonzero(found.counts)
        held = np.clip(value, edges[0], edges[-1])
        slack = 1e-5 * abs(held)
        assert edges[at] - slack <= held <= edges[at + 1] + slack
    assert isinstance(found, Histogram)
