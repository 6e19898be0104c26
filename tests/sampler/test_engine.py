"""Rollouts: decoding equals teacher forcing, and the layout changes nothing but near-ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives, sampler
from sapo_jax.sampler import Plan, sampling
from sapo_jax.types import LENGTH, STOP, Batch, Prompts
from tests import fakes

P, N, G, T = 12, 7, 4, 24


@pytest.fixture(scope="module")
def peaked(nano):
    """The nano policy with a stop token that comes after a few to many tokens."""
    config, weights = nano
    return dataclasses.replace(config, stop_tokens=(1, 4)), weights


def roll(policy, prompts, *, plan=None, temperature=1.0, iteration=3, group_size=G, **kw):
    config, weights = policy
    return jax.device_get(
        sampler.rollout(
            weights, config, prompts, group_size=group_size, max_new_tokens=T,
            temperature=temperature, seed=11, iteration=iteration, plan=plan, **kw,
        )
    )  # fmt: skip


def teacher_forcing(policy, rollout, temperature):
    config, weights = policy
    hp = learner.Hyperparameters(
        objectives.resolve("sapo"), 0.0, 0.0, 1.0, temperature, model=config, head_chunk=64
    )
    zeros = np.zeros(len(rollout.tokens), np.float32)
    batch = Batch(
        rollout.tokens, rollout.mask, rollout.segments,
        rollout.sampler_logp, rollout.sampler_logp, zeros,
    )  # fmt: skip
    return np.asarray(learner.score(weights, batch, hp))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_decoding_equals_teacher_forcing(peaked, temperature):
    """A cache off by one, a wrong position or another temperature shows as a log-prob gap."""
    prompts = fakes.prompts(P, N)
    rollout = roll(peaked, prompts, temperature=temperature)
    assert rollout.mask.sum() > 300
    gap = np.abs(teacher_forcing(peaked, rollout, temperature) - rollout.sampler_logp)
    assert gap[rollout.mask].max() <= 1e-5
    assert not np.any(rollout.sampler_logp[~rollout.mask])


def test_rows_are_left_aligned_and_gap_free(peaked):
    """Prompt, completion through its stop token, pads: one mask and one alignment, end to end."""
    config, _ = peaked
    prompts = fakes.prompts(P, N)
    rollout = roll(peaked, prompts)
    lengths = rollout.mask.sum(-1)
    assert {STOP, LENGTH} == set(rollout.finished)
    for row in range(P * G):
        p, n = prompts.length[row // G], lengths[row]
        np.testing.assert_array_equal(rollout.tokens[row, :p], prompts.tokens[row // G, :p])
        np.testing.assert_array_equal(np.flatnonzero(rollout.mask[row]), np.arange(p, p + n))
        np.testing.assert_array_equal(np.flatnonzero(rollout.segments[row]), np.arange(p + n))
        assert np.all(rollout.tokens[row, p + n :] == config.pad_token)
        stops = np.isin(rollout.tokens[row, p : p + n], config.stop_tokens)
        assert not stops[:-1].any()
        assert rollout.finished[row] == (STOP if stops[-1] else LENGTH)
        assert stops[-1] or n == T
    np.testing.assert_array_equal(rollout.prompt_id, np.repeat(prompts.id, G))
    np.testing.assert_array_equal(rollout.sample_index, np.tile(np.arange(G), P))
    assert set(rollout.policy_step) == {3}


LAYOUTS = {
    "one slot at a time": Plan((1,), (T,), 1),
    "three slots of two rows, refilled singly": Plan((3,), (T,), 1, (2,)),
    "five slots, refilled by twos, shrinking": Plan((5, 4, 2), (4, 12, T), 2, (3, 2, 1)),
    "all slots of one row, small caches": Plan((12, 6, 3), (3, 9, T), 12, (1, 1, 1)),
}


def perturbed_logits(policy, row, prompts, sample, position, temperature):
    """The candidates of one draw with their noise, by teacher forcing on the reference row."""
    config, weights = policy
    logits = model.logits(weights, config, jnp.asarray(row)[None])[0, position - 1] / temperature
    prompt = int(np.flatnonzero(prompts.id == sample[0])[0])
    base = sampling.base_key(np.uint32(11), "train", 3)
    key = sampling.row_keys(base, jnp.asarray(prompts.id[prompt : prompt + 1]), G)[0, sample[1]]
    index = position - int(prompts.length[prompt])
    noise = jax.random.gumbel(jax.random.fold_in(key, index), logits.shape)
    return np.sort(np.asarray(logits + noise))


@pytest.mark.slow
def test_layouts_agree_up_to_near_ties(peaked):
    """Slots, refills, cache sizes and prompt order: the same noise, and the same rows.

    A row may leave the reference only where its two best perturbed logits are closer than 1e-3.
    """
    prompts = fakes.prompts(96, N, seed=5)
    reference = roll(peaked, prompts, plan=Plan((96,), (T,), 96))
    assert reference.mask.sum() >= 4096
    order = np.random.default_rng(1).permutation(96)
    shuffled = Prompts(*(np.asarray(x)[order] for x in jax.tree.leaves(prompts)))
    back = (np.argsort(order)[:, None] * G + np.arange(G)).ravel()
    results = {name: roll(peaked, prompts, plan=plan) for name, plan in LAYOUTS.items()}
    again = roll(peaked, shuffled, plan=LAYOUTS["three slots of two rows, refilled singly"])
    results["another order"] = jax.tree.map(lambda x: x[back], again)
    for name, other in results.items():
        differs = np.flatnonzero((other.tokens != reference.tokens).any(-1))
        assert len(differs) <= 0.01 * len(other.tokens), name
        for row in differs:
            at = int(np.argmax(other.tokens[row] != reference.tokens[row]))
            sample = (reference.prompt_id[row], reference.sample_index[row])
            best = perturbed_logits(peaked, reference.tokens[row], prompts, sample, at, 1.0)
            assert best[-1] - best[-2] < 1e-3, name
        same = np.setdiff1d(np.arange(len(other.tokens)), differs)
        np.testing.assert_array_equal(other.mask[same], reference.mask[same])
        np.testing.assert_allclose(
            other.sampler_logp[same], reference.sampler_logp[same], atol=2e-5
        )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i < 2)) for i, n in enumerate(LAYOUTS)]
)
def test_groups_are_reported_as_they_finish(peaked, name):
    """Each prompt once, with the rows that the rollout ends with; reporting changes no bit."""
    prompts = fakes.prompts(96, N, seed=5)
    seen, parts = {}, []

    def on_groups(index_g, tokens_gGT, count_gG, finished_gG):
        parts.append(len(index_g))
        for p, *group in zip(index_g.tolist(), tokens_gGT, count_gG, finished_gG, strict=True):
            assert p not in seen
            seen[p] = group

    plan = LAYOUTS[name]
    rollout = roll(peaked, prompts, plan=plan, on_groups=on_groups)
    jax.tree.map(np.testing.assert_array_equal, rollout, roll(peaked, prompts, plan=plan))
    assert len(seen) == 96
    assert len(parts) > 4
    for p, (tokens_GT, count_G, finished_G) in seen.items():
        rows = slice(p * G, p * G + G)
        np.testing.assert_array_equal(rollout.mask[rows].sum(-1), count_G)
        np.testing.assert_array_equal(rollout.finished[rows], finished_G)
        for tokens_S, mask_S, tokens_T, count in zip(
            rollout.tokens[rows], rollout.mask[rows], tokens_GT, count_G, strict=True
        ):
            np.testing.assert_array_equal(tokens_S[mask_S], tokens_T[:count])


def test_what_the_decode_steps_computed_is_counted(peaked):
    """Rows flow without the host: of one slot of one row, each completion takes its tokens."""
    prompts, computed = fakes.prompts(P, N), []
    rollout = roll(peaked, prompts, plan=Plan((1,), (T,), 1, (1,)), on_end=computed.append)
    assert computed == [rollout.mask.sum() - P * G]  # the first tokens are the prefill's


def test_a_rollout_can_be_left_between_segments(peaked):
    """Guards against a run that, asked to stop, decodes for minutes."""
    seen = []

    def on_segment():
        seen.append(True)
        if len(seen) == 2:
            raise KeyboardInterrupt

    options = {
        "plan": LAYOUTS["three slots of two rows, refilled singly"],
        "on_segment": on_segment,
    }
    with pytest.raises(KeyboardInterrupt):
        roll(peaked, fakes.prompts(96, N, seed=5), **options)
    assert len(seen) == 2


def test_same_program_is_bitwise_repeatable(peaked):
    prompts = fakes.prompts(P, N)
    first, second = (roll(peaked, prompts) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    third = roll(peaked, prompts, iteration=4)
    assert (first.tokens != third.tokens).any()


def test_samples_of_a_group_differ_and_domains_do_not_share_noise(peaked):
    prompts = fakes.prompts(P, N)
    train = roll(peaked, prompts)
    groups = train.tokens.reshape(P, G, -1)
    assert all((groups[:, i] != groups[:, j]).any() for i in range(G) for j in range(i))
    held_out = roll(peaked, prompts, domain="eval")
    assert (train.tokens != held_out.tokens).any()


def test_a_prompt_that_stands_twice_draws_twice(peaked):
    """With noise by the id alone its groups are copies; what stands once, or first, is unchanged.

    Slots are filled one by one, so that where a copy stands is known to the whole batch only.
    """
    prompts = fakes.prompts(P, N)
    at = np.arange(P)
    at[[4, 7]] = 1
    twice = jax.tree.map(lambda x: x[at], prompts)
    plan = LAYOUTS["three slots of two rows, refilled singly"]
    once, rows = (
        np.where(found.mask, found.tokens, 0).reshape(P, G, -1)
        for found in (roll(peaked, given, plan=plan) for given in (prompts, twice))
    )
    for i, j in ((1, 4), (1, 7), (4, 7)):
        assert (rows[i] != rows[j]).any(-1).mean() > 0.5
    unchanged = np.setdiff1d(np.arange(P), [4, 7])
    assert (rows[unchanged] != once[unchanged]).any(-1).mean() <= 0.01  # near-ties


def test_more_samples_extend_fewer(peaked):
    """Sample i of a prompt is the same whatever the group size."""
    prompts = fakes.prompts(3, N)
    few, many = (roll(peaked, prompts, group_size=g) for g in (2, 5))
    np.testing.assert_array_equal(
        few.tokens.reshape(3, 2, -1), many.tokens.reshape(3, 5, -1)[:, :2]
    )


def test_greedy_follows_the_argmax(peaked):
    config, weights = peaked
    rollout = roll(peaked, fakes.prompts(4, N), temperature=0.0, group_size=1)
    logits = np.asarray(model.logits(weights, config, jnp.asarray(rollout.tokens)))
    for row in range(4):
        at = np.flatnonzero(rollout.mask[row])
        best = np.sort(logits[row, at - 1], -1)
        clear = best[:, -1] - best[:, -2] > 1e-3
        chosen = logits[row, at - 1].argmax(-1)
        np.testing.assert_array_equal(rollout.tokens[row, at][clear], chosen[clear])


def test_a_stop_token_may_be_the_first(peaked):
    """A completion of one token: nothing is decoded, its mask is one long."""
    config, weights = peaked
    everything = tuple(range(config.vocab_size))
    rollout = roll(
        (dataclasses.replace(config, stop_tokens=everything), weights), fakes.prompts(3, N)
    )
    assert np.all(rollout.mask.sum(-1) == 1)
    assert np.all(rollout.finished == STOP)


def test_padding_of_prompts_does_not_matter(peaked):
    """Wider prompt arrays hold the same prompts: only near-ties may differ."""
    narrow = fakes.prompts(P, N)
    wide = narrow.replace(tokens=np.pad(narrow.tokens, ((0, 0), (0, 6)), constant_values=9))
    first, second = roll(peaked, narrow), roll(peaked, wide)
    same = (first.tokens[:, : N + T] == second.tokens[:, : N + T]).all(-1)
    assert same.mean() >= 0.99


def test_warm_up_compiles_everything(peaked):
    """After it, no refill, shrink, growth or length may compile a program."""
    from tests.fakes import Compilations

    prompts = fakes.prompts(10, N + 1, seed=2)
    plan = Plan((5, 8, 2), (4, 12, T), 2, (4, 1, 1))
    lines = []
    empty = roll(peaked, prompts, plan=plan, warm_up=lines.append)
    assert not empty.mask.any()
    assert len(lines) == 1 + 3 + 2
    with Compilations() as compilations:
        for iteration in range(3):
            assert roll(peaked, prompts, plan=plan, iteration=iteration).mask.any()
    assert compilations.count == 0


BAD = [
    ({"group_size": 0}, "at least 1"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_k": 5}, "evaluation"),
    ({"top_p": 0.9}, "evaluation"),
    ({"top_p": 0.0, "domain": "eval"}, "top_p=0.0: must be in"),
    ({"top_k": 0, "domain": "eval"}, "top_k=0: must be at least 1"),
    ({"plan": Plan((4,), (8,), 4)}, "max_new_tokens=24"),
    ({"plan": Plan((40,), (T,), 4)}, "12 prompts"),
    ({"plan": Plan((4,), (T,), 5)}, "is not for"),
    ({"plan": Plan((4, 2), (T,), 4, (2,))}, "is not for"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_wrong_arguments_are_refused(peaked, arguments, message):
    with pytest.raises(ValueError, match=message):
        roll(peaked, fakes.prompts(P, N), **arguments)


def test_context_overflow_is_refused(peaked):
    config, weights = peaked
    short = dataclasses.replace(config, max_position_embeddings=20)
    with pytest.raises(ValueError, match="max_position_embeddings=20"):
        roll((short, weights), fakes.prompts(P, N))


def test_to_sampler_keeps_buffers_where_nothing_changes(peaked):
    """Weight sync costs no copy of what is already in the sampler's dtype and layout."""
    config, weights = peaked
    on_device = jax.device_put(weights)
    fast = sampler.to_sampler(on_device, config)
    assert fast["embed"].unsafe_buffer_pointer() == on_device["embed"].unsafe_buffer_pointer()
    again = sampler.to_sampler(fast, config)
    assert again["layers"][0]["q"].unsafe_buffer_pointer() == (
        fast["layers"][0]["q"].unsafe_buffer_pointer()
    )


def test_the_pad_may_be_a_stop_token(peaked):
    """Many tokenizers pad with their end: rows carry lengths, so that nothing asks which it is."""
    config, weights = peaked
    prompts = fakes.prompts(P, N)
    expected = roll(peaked, prompts)
    stop = config.stop_tokens[1]
    beyond_PN = np.arange(N) >= prompts.length[:, None]
    same = prompts.replace(tokens=np.where(beyond_PN, stop, prompts.tokens))
    got = roll((dataclasses.replace(config, pad_token=stop), weights), same)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(got.tokens[got.mask], expected.tokens[got.mask])
    np.testing.assert_array_equal(got.finished, expected.finished)
    assert np.any((got.mask.sum(-1) == 1) & (got.finished == STOP))  # a stop as the first token
