"""Packed rows and shared prompts: the same loss, gradient and log-probabilities as plain rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives
from sapo_jax.learner import packing
from sapo_jax.masked import finish
from sapo_jax.model import lora
from sapo_jax.types import Batch, Frozen
from tests import fakes
from tests.fakes import VOCAB
from tests.learner.test_step import settings
from tests.model.test_lora import SCALE, adapted

gradient = jax.jit(learner.gradient)  # of plain rows, tests share the programs
GROUPS, G, N, T = 4, 4, 5, 9
B, S = GROUPS * G, N + T


@pytest.fixture
def lengths(rng):
    prompt = np.repeat(rng.integers(2, N + 1, GROUPS), G)
    completion = rng.integers(1, T + 1, B)
    completion[:G] = T  # as long as they get
    completion[-1] = 0  # nothing was sampled
    return prompt, completion


@pytest.fixture
def batch(rng, lengths):
    prompt, completion = (x[:, None] for x in lengths)
    index = np.arange(S)
    tokens = rng.integers(2, VOCAB, (B, S))
    shared = np.repeat(tokens[::G], G, 0)
    own = rng.normal(-3, 0.3, (3, B, S)).astype(np.float32)
    return Batch(
        tokens=np.where(index < prompt, shared, tokens).astype(np.int32),
        mask=(index >= prompt) & (index < prompt + completion),
        segments=(index < prompt + completion).astype(np.int32),
        sampler_logp=own[0],
        old_logp=own[1],
        ref_logp=own[2],
        weights=rng.uniform(0.5, 1.5, (B, S)).astype(np.float32),
        advantages=rng.normal(size=B).astype(np.float32),
    )


def shape(group_size, budget=40):
    return packing.make_shape(B, N, T, group_size=group_size, budget=budget)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [1, G])
@pytest.mark.parametrize("parts", [1, 2])
def test_each_token_has_one_place(lengths, group_size, parts):
    sized = packing.make_shape(B, N, T, group_size=group_size, budget=40, parts=parts)
    layout = packing.plan(*lengths, S, sized)
    prompt, completion = lengths
    index = np.arange(S)
    exists = index < (prompt + completion)[:, None]
    exists[completion + prompt == 0] = False
    assert np.array_equal(layout.place >= 0, exists)
    completions = exists & (index >= prompt[:, None])
    assert np.array_equal(
        layout.token.ravel()[layout.place[completions]], np.flatnonzero(completions)
    )
    stored = layout.token[layout.token >= 0]
    assert len(set(stored)) == len(stored)
    assert np.array_equal(layout.token >= 0, layout.segments > 0)
    assert (len(stored) < exists.sum()) == (group_size > 1)
    # Nothing stands in micro-batches that are not in use.
    rows = layout.token.reshape(parts, sized.micro_batches, -1)
    assert (rows[:, layout.count[0] :] < 0).all()
    assert len(set(layout.count)) == 1


@pytest.mark.parametrize("group_size", [1, 2, 8, 16])
@pytest.mark.parametrize("budget", [1, 30, 64, 1000, 10**6])
def test_there_is_room_for_any_lengths(rng, group_size, budget):
    for case in range(20):
        sized = packing.make_shape(32, 7, 11, group_size=group_size, budget=budget)
        completion = rng.integers(0, 12, 32) if case % 4 else np.full(32, 11 - case % 8)
        layout = packing.plan(np.full(32, 7), completion, 18, sized)
        assert layout.count[0] <= sized.micro_batches
        assert (layout.place >= 0).sum() == (completion + 7).sum()


def test_rows_without_a_length_are_left_out(lengths, batch):
    prompt, completion = (np.where(np.arange(B) // G == 1, 0, x) for x in lengths)
    layout = packing.plan(prompt, completion, S, shape(G))
    assert (layout.place[G : 2 * G] == -1).all()
    assert not np.isin(layout.token // S, range(G, 2 * G)).any()


NAMES = [
    "sapo", "dapo", "p3o", "cispo", "reinforce", "maspo", "mhpo",  # of each token
    "gspo", "gspo_token", "gmpo", "luspo", "vespo",  # of the sequence
]  # fmt: skip


@pytest.mark.parametrize("group_size", [pytest.param(1, marks=pytest.mark.slow), G])
def test_gradients_are_those_of_plain_rows(nano, batch, lengths, group_size):
    """One program for all objectives, hence for all that they have in common."""
    config, weights = nano
    sized = shape(group_size)
    packed = learner.pack(batch, packing.plan(*lengths, S, sized))
    switch = objectives.resolve(objectives.switch(NAMES), kl_coef=0.1)
    plain = learner.Hyperparameters(switch, 1e-3, 0.0, 1e9, 0.8, model=config, head_chunk=16)
    of_packed = plain.replace(micro_batches=sized.micro_batches)
    for index, name in enumerate(NAMES):
        at = {"objective": objectives.resolve(switch, index=index)}
        want = gradient(weights, batch, plain.replace(**at))
        same(gradient(weights, packed, of_packed.replace(**at)), want, name)


def same(got, want, name=None):
    """Gradients, and the metrics that come with them, to f32 rounding."""
    (got, packed_terms), (want, terms) = got, want
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    assert scale > 0, name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, want)
    (loss, metrics), (packed_loss, packed_metrics) = finish(terms), finish(packed_terms)
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert packed_metrics.keys() == metrics.keys()
    for key in metrics:
        if key not in ("nonfinite", "router/load") and not key.startswith("histogram/"):
            assert float(packed_metrics[key]) == pytest.approx(
                float(metrics[key]), rel=1e-4, abs=2e-6
            ), (name, key)


@pytest.mark.parametrize(
    ("replay", "group_size"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("none", G), ("R3", 1))),
        ("R3", G),
    ],
)
def test_experts_are_replayed_and_balanced_as_in_plain_rows(
    rng, batch, lengths, replay, group_size
):
    config = model.make("nano_moe", vocab_size=VOCAB, max_position_embeddings=64)
    weights, sized = fakes.weights(config, 0.2), shape(group_size)
    batch = routed(rng, batch, lengths, config)
    hp = learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-3, 0.0, 1e9, 1.0, model=config, head_chunk=16,
        routing_replay=replay, router_aux_coef=0.1,
    )  # fmt: skip
    packed = learner.pack(batch, packing.plan(*lengths, S, sized))
    got = gradient(weights, packed, hp.replace(micro_batches=sized.micro_batches))
    same(got, gradient(weights, batch, hp))


def routed(rng, batch, lengths, config):
    """The batch with experts, as a sampler records them."""
    experts = rng.permuted(
        np.broadcast_to(np.arange(config.num_experts), (B, S, 2, config.num_experts)), axis=-1
    )[..., : config.num_experts_per_tok]
    lengths[0][-1] = batch.segments[-1] = 0  # a row without a completion is not there
    shared = np.repeat(experts[::G], G, 0)  # a prompt is routed once
    prompt = (np.arange(S) < lengths[0][:, None])[..., None, None]
    exists = np.asarray(batch.segments > 0)[..., None, None]
    routing = np.where(exists, np.where(prompt, shared, experts), -1).astype(np.int8)
    return batch.replace(routing=routing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "group_size"),
    [
        *(("nano", size) for size in (1, G)),
        ("nano_moe", G),
    ],
)
def test_adapters_learn_from_packed_rows_as_merged_ones_from_plain_rows(
    rng, batch, lengths, preset, group_size
):
    """By the chain rule; experts are replayed."""
    config = model.make(preset, vocab_size=VOCAB, max_position_embeddings=64)
    own, adapters = adapted(config)
    base, sized, replay = fakes.weights(config, 0.2), shape(group_size), "none"
    if config.num_experts:
        batch, replay = routed(rng, batch, lengths, config), "R3"

    def merged(own):
        return lora.merge(lora.join(own, Frozen(base), SCALE))

    policy, pull = jax.vjp(merged, adapters)
    grads, terms = gradient(policy, batch, settings(config, routing_replay=replay))
    packed = learner.pack(batch, packing.plan(*lengths, S, sized))
    hp = settings(own, routing_replay=replay, micro_batches=sized.micro_batches, lora_scale=SCALE)
    same(gradient(adapters, packed, hp, Frozen(base)), (*pull(grads), terms))


@pytest.mark.parametrize("group_size", [1, G])
def test_scores_come_back_to_their_rows(nano, batch, lengths, group_size):
    config, weights = nano
    sized = shape(group_size)
    layout = packing.plan(*lengths, S, sized)
    hp = learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-3, 0.0, 1e9, 1.0, model=config, head_chunk=16
    )
    want = learner.score(weights, batch, hp)
    packed = learner.pack(batch, layout)
    got = learner.score(weights, packed, hp.replace(micro_batches=sized.micro_batches))
    np.testing.assert_allclose(learner.unpack(got, layout), want, atol=1e-5)
