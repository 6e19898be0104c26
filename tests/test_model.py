"""The policy: causality, invariances, the chunked head, and an independent float64 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import model
from sapo_jax.model import attention, head, params, transformer
from tests import fakes


def reference_logits(weights, config, tokens):
    """One row in numpy float64, written from the architecture's description, loop by loop."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    half = config.head_dim // 2
    angle = np.arange(len(tokens))[:, None] * config.rope_theta ** (-np.arange(half) / half)

    def rotate(x):
        first, second = x[:, :half], x[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["embed"][tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        layer = {name: value[i] for name, value in w["layers"].items()}
        h = norm(x, layer["attn_norm"])
        out = 0
        for head_index in range(config.num_attention_heads):
            kv = head_index // group
            q = rotate(norm(h @ layer["q"][:, head_index], layer["q_norm"]))
            k = rotate(norm(h @ layer["k"][:, kv], layer["k_norm"]))
            scores = q @ k.T / np.sqrt(config.head_dim)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            out = out + weight @ (h @ layer["v"][:, kv]) @ layer["o"][head_index]
        x = x + out
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    return norm(x, w["final_norm"]) @ w.get("head", w["embed"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_match_a_float64_reference(tied, rng):
    """A missing norm, a wrong rotation or a wrong head grouping moves the logits by percents."""
    config = model.make("nano", vocab_size=23, tie_word_embeddings=tied)
    weights = fakes.perturbed(params.init(config, 3), 0.2)
    tokens = rng.integers(0, 23, (2, 11))
    logits = np.asarray(model.logits(weights, config, jnp.asarray(tokens)))
    for row in range(2):
        expected = reference_logits(weights, config, tokens[row])
        np.testing.assert_allclose(logits[row], expected, atol=1e-5 * np.abs(expected).max())


def test_causal(nano, rng):
    """A token that sees the next one makes every importance ratio meaningless."""
    config, weights = nano
    tokens = rng.integers(2, 23, (1, 12))
    changed = tokens.copy()
    changed[0, 7:] = rng.integers(2, 23, 5)
    before, after = (np.asarray(model.logits(weights, config, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 0.1


def test_packed_segments_do_not_see_each_other(nano, rng):
    """Packing two sequences into a row gives each the hidden states that it has alone."""
    config, weights = nano
    first, second = rng.integers(2, 23, (1, 5)), rng.integers(2, 23, (1, 7))
    packed = np.concatenate([first, second], 1)
    segments = np.repeat([[1, 2]], [5, 7], axis=1)
    together = transformer.hidden(weights, config, packed, segments)
    np.testing.assert_array_equal(
        attention.positions(jnp.asarray(segments)), [[*range(5), *range(7)]]
    )
    for part, rows in ((first, together[:, :5]), (second, together[:, 5:])):
        alone = transformer.hidden(weights, config, part, np.ones_like(part))
        np.testing.assert_allclose(alone, rows, atol=2e-5)


def test_remat_changes_nothing(nano, rng):
    config, weights = nano
    tokens = rng.integers(2, 23, (2, 6))

    def total(w, remat):
        ones = jnp.ones_like(tokens)
        return jnp.sum(transformer.hidden(w, config, tokens, ones, remat=remat) ** 2)

    plain, again = (jax.grad(total)(weights, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def dense_head(hidden, weight, targets, temperature):
    logp = jax.nn.log_softmax(hidden @ weight.T / temperature)
    return jnp.take_along_axis(logp, targets[:, None], -1)[:, 0], -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("masked_in", [0, 1, 13, 20])
def test_head_equals_dense_softmax(chunk, masked_in, rng):
    """Values and gradients for any chunk size and any mask, holes and none at all included."""
    with jax.enable_x64(True):
        hidden, weight = rng.normal(size=(20, 6)), rng.normal(size=(17, 6))
        targets = jnp.asarray(rng.integers(0, 17, 20), jnp.int32)
        mask = jnp.isin(jnp.arange(20), rng.permutation(20)[:masked_in])
        a, b = rng.normal(size=(2, 20))
        temperature = 0.7

        def chunked(h, w):
            outs = head.logp_entropy(
                jnp.float32(h), jnp.float32(w), targets, mask, jnp.float32(temperature), chunk
            )
            return jnp.sum(outs[0] * a + outs[1] * b), outs

        def dense(h, w):
            outs = tuple(jnp.where(mask, x, 0) for x in dense_head(h, w, targets, temperature))
            return jnp.sum(outs[0] * a + outs[1] * b), outs

        got, expected = (
            jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(jnp.asarray(hidden), weight)
            for f in (chunked, dense)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, expected)


@pytest.mark.parametrize("preset", sorted(model.PRESETS))
def test_presets_have_their_published_sizes(preset):
    published = {"qwen3_0_6b": 0.596, "qwen3_1_7b": 1.72, "qwen3_4b": 4.02, "qwen3_8b": 8.19}
    if preset in published:
        count = params.count(model.make(preset)) / 1e9
        assert count == pytest.approx(published[preset], rel=3e-3)
    else:
        assert 5e4 < params.count(model.make(preset, vocab_size=16)) < 1e7


def test_bf16_stays_close_to_f32(nano, rng):
    """Compute in bf16 with f32 parameters: the head's softmax is still f32."""
    config, weights = nano
    tokens = rng.integers(2, 23, (2, 12))
    low = dataclasses.replace(config, compute_dtype="bfloat16")
    exact, rough = (np.asarray(model.logits(weights, c, tokens)) for c in (config, low))
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


BAD = [
    ({"num_attention_heads": 3}, "num_key_value_heads=2"),
    ({"head_dim": 15}, "even"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"compute_dtype": "float16"}, "float32, bfloat16"),
    ({"stop_tokens": (99,)}, "vocab_size=23"),
    ({"stop_tokens": ()}, "at least one"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_wrong_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model.make("nano", vocab_size=23, **fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'qwen3_8b'"):
        model.make("qwen3_9b")
