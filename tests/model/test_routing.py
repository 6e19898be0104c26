"""Routing replay: positions agree between sampler and learner, ratios are exact, metrics count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives, sampler
from sapo_jax.masked import finish
from sapo_jax.model import moe, routing, transformer
from sapo_jax.sampler import Plan
from sapo_jax.types import Batch
from tests import fakes
from tests.training.test_metrics import check

P, N, G, T = 6, 5, 4, 10
# Slots refilled one by one, whose rows are handed on and compacted: samples keep their routing.
PLAN = Plan((2, 1), (T,), 1, (3, 2))


@pytest.fixture(scope="module")
def policy():
    """Two dense and two sparse layers by turns; routing depends on the token and what precedes."""
    config = model.make(
        "nano_moe", vocab_size=fakes.VOCAB, num_hidden_layers=4, decoder_sparse_step=2,
        stop_tokens=(1, 4), max_position_embeddings=64,
    )  # fmt: skip
    return config, fakes.weights(config, 0.2)


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
    """Gradient and metrics; R2 and R3 share a program, who recorded the experts is data."""
    grads, terms = learner.gradient(weights, batch, hp)
    return grads, finish(terms)[1]


def known(rollout):
    """Positions whose token was fed: all but pads and the last token of a completion."""
    end = rollout.segments.sum(-1) - 1
    return np.arange(rollout.tokens.shape[1]) < end[:, None]


def close(got, expected):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), got, expected)


def test_the_sampler_records_every_token_that_it_feeds(policy, rollout):
    config, _ = policy
    assert len(set(rollout.mask.sum(-1).tolist())) > 2
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
    config, weights = policy
    _, values = update(weights, again, settings(config, routing_replay="R2"))
    assert values["sampler/logp_gap_max"] == 0
    assert values["policy/ratio_max"] == values["policy/ratio_min"] == 1
    assert values["router/differs"] == 0


def test_r3_restores_the_samplers_log_probs(policy, batch):
    """With a router that has moved on, only replay reproduces the sampler's experts.

    The router keeps its gradient though its choice is replaced.
    """
    config, weights = policy
    grads, values = update(weights, batch, settings(config, routing_replay="R2"))
    assert values["sampler/logp_gap_max"] <= 1e-5
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["layers"]["router"]).max()) > 1e-3 * largest
    noise = np.random.default_rng(5).normal(size=weights["layers"]["router"].shape)
    router = weights["layers"]["router"] + np.float32(0.05 * noise)
    nudged = {**weights, "layers": {**weights["layers"], "router": router}}
    logp, own = learner.score_routing(nudged, batch, settings(config, routing_replay="R2"))
    _, replayed = update(nudged, batch, settings(config, routing_replay="R2"))
    differs = np.asarray(moe.differs(own, batch.routing))[known(batch)].mean()
    assert differs > 0.01
    assert float(replayed["router/differs"]) == pytest.approx(differs, rel=0.3)
    gap = np.abs(logp - batch.sampler_logp)[batch.mask].max()
    assert gap > 1e-3
    assert replayed["sampler/logp_gap_max"] < gap


@pytest.mark.slow  # test_moe compares one layer in the same way
def test_replay_gives_the_gradient_of_forced_experts(policy, batch):
    """Changed parameters: the gradient is that of a model with the experts forced, router included.

    The reference sums every expert with gates that are 0 outside the forced ones.
    """
    config, weights = policy
    weights = fakes.perturbed(weights, 0.02, seed=9)
    got, _ = update(weights, batch, settings(config, routing_replay="R2"))

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
    close(got, expected)


def drawn_routing(rows):
    """Two layers' routing of some rows of four tokens, by random routers; and which exist."""
    rng = np.random.default_rng(rows)
    probs = rng.dirichlet(np.full(8, 0.5), size=(2, rows, 4)).astype(np.float32)
    experts = np.argsort(-probs, -1)[..., :2].astype(np.int32)
    return moe.Routing(experts, experts, probs, probs), rng.random((rows, 4)) < 0.7


def test_the_load_balancing_loss_by_hand():
    """E · mean over layers of Σ_e f_e P_e, over the tokens that exist; k if balanced.

    Fractions of the whole minibatch: the parts of any split add up to the same.
    """
    config = model.make("nano_moe", vocab_size=23, num_experts=8)
    decided, valid = drawn_routing(6)

    @jax.jit
    def summary(decided, valid):
        return jax.vmap(lambda layer: routing.summarise(layer, valid, config))(decided)

    def part(rows):
        return summary(jax.tree.map(lambda x: x[:, rows], decided), valid[rows])

    total = 0.0
    for layer in range(2):
        f = np.bincount(decided.experts[layer][valid].ravel(), minlength=8) / valid.sum()
        total += 8 * np.sum(f * decided.probs[layer][valid].mean(0)) / 2
    share = part(slice(0, 6)).counts / (2 * valid.sum())
    for split in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        got = sum(routing.balance(part(rows), share, 2) for rows in split)
        assert float(got) / valid.sum() == pytest.approx(total, rel=1e-5)
    assert total > 2


@pytest.mark.slow
def test_the_load_balancing_loss_in_an_update(policy, batch):
    """It does not depend on the split into micro-batches, moves the router, and is the formula's.

    Fractions are taken over the minibatch: per micro-batch they would give another loss.
    """
    config, weights = policy
    runs = [
        update(weights, batch, settings(config, micro_batches=m, router_aux_coef=0.1))
        for m in (1, 2)
    ]
    (first, _), (second, _) = runs
    close(first, second)
    plain, _ = update(weights, batch, settings(config, micro_batches=2, router_aux_coef=0.0))
    assert float(jnp.abs(plain["layers"]["router"] - first["layers"]["router"]).max()) > 1e-4
    _, (experts, probs) = jax.jit(
        lambda w: transformer.hidden(
            w, config, batch.tokens, batch.segments, summarise=lambda r: (r.experts, r.probs)
        )
    )(weights)
    valid, total = batch.segments > 0, 0.0
    for layer in range(2):
        f = np.bincount(np.asarray(experts)[layer][valid].ravel(), minlength=8) / valid.sum()
        total += 8 * np.sum(f * np.asarray(probs)[layer][valid].mean(0)) / 2
    for _, values in runs:
        assert float(values["router/balance"]) == pytest.approx(0.1 * total, rel=1e-4)
        assert values["router/differs"] <= 0.01
        assert 1 <= values["router/load_max"] <= 8 / 2
        assert 0 < values["router/entropy"] < np.log(8)


def test_metrics_of_routers_are_in_the_table(policy, batch):
    config, weights = policy
    hp = settings(config, router_aux_coef=0.1)
    values = jax.eval_shape(update, weights, batch, hp)[1]
    found = {key: value for key, value in values.items() if key.startswith("router/")}
    experts = "a model with experts"
    check(found, experts, f"{experts}, source=rollout", "learner.router_aux_coef")


def test_a_batch_without_routing_cannot_be_replayed(policy, batch):
    config, weights = policy
    with pytest.raises(ValueError, match="the batch has no routing"):
        learner.score(weights, batch.replace(routing=None), settings(config, routing_replay="R3"))


def test_modes_are_named():
    assert routing.REPLAY == ("none", "R2", "R3")
