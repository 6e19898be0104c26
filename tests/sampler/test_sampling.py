"""One draw: the right distribution, the right noise, and honest log-probabilities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.sampler import sampling
from tests import fakes


def draws(logits, count, *, truncate=False, **controls):
    c = sampling.controls(**({"temperature": 1.0} | controls))
    key = sampling.base_key(0, "test", 0)
    one = jax.jit(
        jax.vmap(lambda i: sampling.draw(key, i, jnp.asarray(logits), c, truncate=truncate))
    )
    return one(jnp.arange(count))


@pytest.mark.parametrize("vocab", [7, 1000])
def test_frequencies_follow_the_softmax(vocab, rng):
    """Exact in one stage and in two: a block must be drawn by its mass, not its maximum."""
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    count = 40_000
    tokens, logp = draws(logits, count, temperature=1.3)
    p = np.asarray(jax.nn.softmax(logits / 1.3), np.float64)
    observed = np.bincount(tokens, minlength=vocab)
    likely = p * count >= 5
    chi2 = ((observed - count * p)[likely] ** 2 / (count * p)[likely]).sum()
    assert chi2 < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    np.testing.assert_allclose(logp, np.log(p)[tokens], atol=1e-5)


@pytest.mark.parametrize("vocab", [7, 1000])
def test_greedy_takes_the_argmax_at_temperature_one(vocab, rng):
    logits = rng.normal(0, 2, vocab).astype(np.float32)
    tokens, logp = draws(logits, 50, temperature=0.0)
    assert set(np.asarray(tokens)) == {logits.argmax()}
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits).max(), rtol=1e-5)


def test_truncation_keeps_the_likeliest_and_reports_the_whole_softmax():
    """Log-probabilities under truncation stay those of the full distribution."""
    logits = np.log(np.array([0.5, 0.05, 0.25, 0.15, 0.05], np.float32))
    top_k, logp = draws(logits, 2000, truncate=True, top_k=2)
    assert set(np.asarray(top_k)) == {0, 2}
    np.testing.assert_allclose(logp, logits[top_k], atol=1e-5)
    top_p, _ = draws(logits, 2000, truncate=True, top_p=0.8)  # 0.5 + 0.25 < 0.8 needs a third
    assert set(np.asarray(top_p)) == {0, 2, 3}
    everything, _ = draws(logits, 5000, truncate=True, top_p=1.0, top_k=5)
    assert set(np.asarray(everything)) == set(range(5))


WRONG = [
    {"top_p": 0.0}, {"top_p": -0.5}, {"top_p": 1.5}, {"top_p": np.nan}, {"top_k": 0}, {"top_k": -1},
    {"temperature": -1.0}, {"temperature": np.nan}, {"temperature": np.inf},
    {"temperature": 1e-320},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_draws_from_no_distribution_is_refused(wrong):
    """Each of them sampled pads up to the limit, or NaN."""
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be"):
        sampling.controls(**({"temperature": 1.0} | wrong))


def test_the_likeliest_token_always_stays():
    """The smallest top_p is 0 in float32; a top_k may be beyond 32 bits."""
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    assert set(np.asarray(draws(logits, 50, truncate=True, top_p=1e-320)[0])) == {1}
    assert set(np.asarray(draws(logits, 500, truncate=True, top_k=2**40)[0])) == {0, 1, 2}


def test_the_noise_is_that_of_jax_random():
    """Its rounds are written out here; samples of before stay."""
    key = sampling.base_key(3, "test", 1)
    data, index = jax.random.key_data(key), jnp.arange(7, dtype=jnp.uint32)
    folded = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, index))
    np.testing.assert_array_equal(sampling._fold_in(data, index), folded)
    same = partial(np.testing.assert_allclose, rtol=1e-6)
    same(sampling._gumbel(data, index), jax.random.gumbel(key, index.shape))
    outer, inner = jax.random.split(key)
    found = sampling._two_gumbels(data, 5)
    same(found[0], jax.random.gumbel(outer, (5,)))
    same(found[1], jax.random.gumbel(inner, (sampling.BLOCK,)))


def test_padded_vocabulary_is_never_drawn():
    logits = np.full(600, -np.inf, np.float32)
    logits[:300] = 0
    tokens, _ = draws(logits, 2000)
    assert tokens.max() < 300


def test_noise_depends_on_every_part_of_its_name():
    """Reused noise correlates samples: each coordinate must change the draw, the order must not."""

    def noise(seed=0, domain="train", iteration=1, prompt=5, sample=2, index=3):
        base = sampling.base_key(seed, domain, iteration)
        key = sampling.row_keys(base, jnp.array([prompt], jnp.uint32), 4)[0, sample]
        return np.asarray(jax.random.bits(jax.random.fold_in(key, index), (4,)))

    changes = [
        {"seed": 1}, {"domain": "eval"}, {"iteration": 2}, {"prompt": 6}, {"sample": 1},
        {"index": 4},
    ]  # fmt: skip
    drawn = [tuple(noise())] + [tuple(noise(**change)) for change in changes]
    assert len(set(drawn)) == len(drawn)
    occurrence = sampling.with_occurrence(fakes.prompts(4, 2).replace(id=[5, 9, 5, 5])).occurrence
    np.testing.assert_array_equal(occurrence, [0, 0, 1, 2])
    base = sampling.base_key(0, "train", 1)
    ids = jnp.array([5, 9, 5, 5], jnp.uint32)
    again, few, plain = (
        jax.random.key_data(sampling.row_keys(base, ids, size, repeats))
        for size, repeats in ((4, occurrence), (2, occurrence), (4, None))
    )
    assert len(np.unique(again.reshape(16, -1), axis=0)) == 16
    np.testing.assert_array_equal(again[:2], plain[:2])  # where each stands once
    np.testing.assert_array_equal(again[:, :2], few)
    forward = sampling.row_keys(base, jnp.array([5, 9], jnp.uint32), 4)
    backward = sampling.row_keys(base, jnp.array([9, 5], jnp.uint32), 8)
    np.testing.assert_array_equal(
        jax.random.key_data(forward[0]), jax.random.key_data(backward[1, :4])
    )
