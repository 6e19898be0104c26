"""Routing replay: positions agree between sampler and learner, ratios are exact, metrics count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives, routing, sampler
from sapo_jax.aggregations import finish
from sapo_jax.model import moe, params, transformer
from sapo_jax.sampler import Plan
from sapo_jax.types import Batch
from tests import fakes

P, N, G, T = 6, 5, 4, 10
# Slots that are refilled one by one and compacted once: positions are the hardest to keep.
PLAN = Plan((2, 1), (T,), 1)


@pytest.fixture(scope="module")
def policy():
    """Two dense and two sparse layers by turns; routing depends on the token and what precedes."""
    config = model.make(
        "nano_moe", vocab_size=fakes.VOCAB, num_hidden_layers=4, decoder_sparse_step=2,
        stop_tokens=(1, 4), max_position_embeddings=64,
    )  # fmt: skip
    weights = fakes.perturbed(jax.jit(params.init, static_argnums=0)(config, 0), 0.2)
    return config, weights


def settings(config, **kw):
    options = {"micro_batches": 2, "head_chunk": 32, **kw}
    return learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-3, 0.0, 1e9, 1.0, model=config, **options
    )


@pytest.fixture(scope="module")
def rollout(policy):
    config, weights = policy
    return jax.device_get(
        sampler.rollout(
            weights, config, fakes.prompts(P, N), group_size=G, max_new_tokens=T,
            temperature=1.0, seed=3, iteration=1, plan=PLAN,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(rollout):
    advantages = np.random.default_rng(0).normal(size=P * G).astype(np.float32)
    return Batch(
        rollout.tokens, rollout.mask, rollout.segments, rollout.sampler_logp,
        rollout.sampler_logp, advantages, routing=rollout.routing,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(policy, batch):
    """log π and the routers' own choices, as the learner finds them."""
    config, weights = policy
    return learner.score_routing(weights, batch, settings(config, routing_replay="R2"))


@jax.jit
def update(weights, batch, hp):
    """Gradient and metrics; tests share its two programs, with replay and without."""
    grads, terms = learner.gradient(weights, batch, hp)
    return grads, finish(terms)[1]


def replayed(policy, batch, weights=None):
    """R2 and R3 differ in who recorded the experts, which is the batch's affair."""
    config, own = policy
    return update(weights or own, batch, settings(config, routing_replay="R2"))


def live(policy, batch, weights=None, aux=0.0):
    config, own = policy
    return update(weights or own, batch, settings(config, router_aux_coef=aux))


def known(rollout):
    """Positions whose token was fed: all but pads and the last token of a completion."""
    end = rollout.segments.sum(-1) - 1
    return np.arange(rollout.tokens.shape[1]) < end[:, None]


def close(got, expected):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), got, expected)
    return scale


def test_the_sampler_records_every_token_that_it_feeds(policy, rollout):
    config, _ = policy
    assert rollout.routing.dtype == np.int8
    assert rollout.routing.shape == (P * G, N + T, 2, config.num_experts_per_tok)
    np.testing.assert_array_equal((rollout.routing >= 0).all((-1, -2)), known(rollout))
    np.testing.assert_array_equal((rollout.routing < 0).all((-1, -2)), ~known(rollout))


def test_sampler_and_learner_agree_on_positions(rollout, scored):
    """The learner's own routing is the recorded one; shifted by one it is not.

    A misaligned replay is silent: nothing crashes, the gradient is wrong.
    """
    _, own = scored
    where = known(rollout)
    assert np.asarray(moe.differs(own, rollout.routing))[where].mean() <= 0.01
    shifted = np.asarray(moe.differs(own[:, 1:], rollout.routing[:, :-1]))
    assert shifted[where[:, 1:]].mean() > 0.5
    swapped = np.asarray(moe.differs(own, rollout.routing[:, :, ::-1]))
    assert swapped[where].mean() > 0.5


def test_r2_has_log_ratio_exactly_zero(policy, batch, scored):
    """Same parameters, same micro-batches, same experts: the first update is on-policy, bitwise."""
    logp, recorded = scored
    again = batch.replace(old_logp=logp, sampler_logp=logp, routing=recorded)
    _, values = replayed(policy, again)
    assert values["sampler/logp_gap_max"] == 0
    assert values["policy/ratio_max"] == values["policy/ratio_min"] == 1
    assert values["router/differs"] == 0


def test_r3_restores_the_samplers_log_probs(policy, batch):
    """With a router that has moved on, only replay reproduces the sampler's experts."""
    _, values = replayed(policy, batch)
    assert values["sampler/logp_gap_max"] <= 1e-5
    _, weights = policy
    noise = np.random.default_rng(5).normal(size=weights["layers"]["router"].shape)
    router = weights["layers"]["router"] + np.float32(0.05 * noise)
    nudged = {**weights, "layers": {**weights["layers"], "router": router}}
    (_, without), (_, with_replay) = (f(policy, batch, nudged) for f in (live, replayed))
    assert without["router/differs"] > 0.01
    assert with_replay["router/differs"] > 0.01
    assert without["sampler/logp_gap_max"] > 1e-3
    assert with_replay["sampler/logp_gap_max"] < without["sampler/logp_gap_max"]


def test_replay_keeps_the_routers_gradient(policy, batch):
    """Changed parameters: the gradient is that of a model with the experts forced, router included.

    The reference sums every expert with gates that are 0 outside the forced ones.
    """
    config, weights = policy
    weights = fakes.perturbed(weights, 0.02, seed=9)
    got, _ = replayed(policy, batch, weights)

    def dense_experts(w, config, hidden, routed):
        chosen = jnp.sum(jax.nn.one_hot(routed.experts, config.num_experts), -2)
        gates = routed.probs * chosen
        gates = gates / jnp.sum(gates, -1, keepdims=True)
        inner = jax.nn.silu(jnp.einsum("...d,edf->...ef", hidden, w["experts_gate"]))
        inner = inner * jnp.einsum("...d,edf->...ef", hidden, w["experts_up"])
        return jnp.einsum("...ef,efd,...e->...d", inner, w["experts_down"], gates)

    hp = settings(config, routing_replay="R2", micro_batches=1)
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(moe, "experts", dense_experts)
        expected = jax.jit(lambda *a: learner.gradient(*a)[0])(weights, batch, hp)
    scale = close(got, expected)
    assert float(jnp.abs(got["layers"]["router"]).max()) > 1e-3 * scale


def test_the_load_balancing_loss_does_not_depend_on_the_split(policy, batch):
    """Fractions are taken over the minibatch: per micro-batch they would give another loss.

    Which rows share a micro-batch changes, and the program does not.
    """
    order = np.argsort(batch.tokens[:, 0], kind="stable")
    mixed = jax.tree.map(lambda x: x[order], batch)
    (first, values), (second, mixed_values) = (live(policy, b, aux=0.1) for b in (batch, mixed))
    close(first, second)
    assert float(values["router/balance"]) == pytest.approx(
        float(mixed_values["router/balance"]), rel=1e-5
    )
    plain, _ = live(policy, batch)
    moved = jnp.abs(plain["layers"]["router"] - first["layers"]["router"]).max()
    assert float(moved) > 1e-4


def test_the_load_balancing_loss_by_hand(policy, batch):
    """coef · E · mean over layers of Σ_e f_e P_e, over the tokens that exist; k if balanced."""
    config, weights = policy
    _, values = live(policy, batch, aux=0.1)
    _, summary = jax.jit(
        lambda w: transformer.hidden_routing(
            w, config, batch.tokens, batch.segments,
            summarise=lambda r: (r.experts, r.probs),
        )
    )(weights)  # fmt: skip
    experts, probs = (np.asarray(x) for x in summary)
    valid = batch.segments > 0
    total = 0.0
    for layer in range(2):
        f = np.bincount(experts[layer][valid].ravel(), minlength=8) / valid.sum()
        total += 8 * np.sum(f * probs[layer][valid].mean(0)) / 2
    assert total > config.num_experts_per_tok
    assert float(values["router/balance"]) == pytest.approx(0.1 * total, rel=1e-4)
    assert 1 <= float(values["router/load_max"]) <= 8 / 2
    assert 0 < float(values["router/entropy"]) < np.log(8)


def test_a_batch_without_routing_cannot_be_replayed(policy, batch):
    config, weights = policy
    with pytest.raises(ValueError, match="the batch has no routing"):
        learner.score(weights, batch.replace(routing=None), settings(config, routing_replay="R3"))


def test_modes_are_named():
    assert routing.REPLAY == ("none", "R2", "R3")
