"""The policy: causality, invariances, the chunked head, and an independent float64 reference."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import model
from sapo_jax.model import head, params, transformer
from tests import fakes


def reference_mlp(h, layer, config):
    """SwiGLU, or the gated sum of each token's best experts, token by token."""

    def swiglu(x, gate, up, down):
        inner = x @ gate
        return (inner / (1 + np.exp(-inner)) * (x @ up)) @ down

    if "router" not in layer:
        return swiglu(h, layer["gate"], layer["up"], layer["down"])
    out = np.zeros_like(h)
    for i, x in enumerate(h):
        logits = x @ layer["router"]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probs)[: config.num_experts_per_tok]
        total = probs[chosen].sum() if config.norm_topk_prob else 1.0
        for e in chosen:
            matrices = (layer[f"experts_{name}"][e] for name in ("gate", "up", "down"))
            out[i] += probs[e] / total * swiglu(x, *matrices)
    return out


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
    for layer in params.unstack(w["layers"], config):
        h = norm(x, layer["attn_norm"])

        def project(name, head_index, h=h, layer=layer):
            out = h @ layer[name][:, head_index] + layer.get(name + "_bias", [0] * 99)[head_index]
            return norm(out, layer[name + "_norm"]) if name + "_norm" in layer else out

        out = layer.get("o_bias", 0)
        for head_index in range(config.num_attention_heads):
            kv = head_index // group
            q, k = rotate(project("q", head_index)), rotate(project("k", kv))
            scores = q @ k.T / np.sqrt(config.head_dim)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            out = out + weight @ project("v", kv) @ layer["o"][head_index]
        x = x + out
        x = x + reference_mlp(norm(x, layer["mlp_norm"]), layer, config)
    return norm(x, w["final_norm"]) @ w.get("head", w["embed"]).T


MIXED = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
ARCHITECTURES = {
    "qwen3": ("nano", {}),
    "untied": ("nano", {"tie_word_embeddings": False}),
    "qwen3 biased": ("nano", {"attention_bias": True}),
    "qwen2": ("nano", {"model_type": "qwen2", "num_key_value_heads": 1}),
    "llama": ("nano", {"model_type": "llama", "num_key_value_heads": 4}),
    "moe": ("nano_moe", {}),
    "moe, gates not normalised": ("nano_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "dense and sparse by turns": ("nano_moe", MIXED),
    "a dense layer first": ("nano_moe", {"num_hidden_layers": 3, "mlp_only_layers": [0]}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_match_a_float64_reference(name, rng):
    """A missing norm or bias, a wrong rotation, head grouping or gate moves logits by percents."""
    preset, fields = ARCHITECTURES[name]
    config = model.make(preset, vocab_size=23, **fields)
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
    together, _ = transformer.hidden(weights, config, packed, segments)
    for part, rows in ((first, together[:, :5]), (second, together[:, 5:])):
        alone, _ = transformer.hidden(weights, config, part, np.ones_like(part))
        np.testing.assert_allclose(alone, rows, atol=2e-5)


@pytest.mark.slow
def test_remat_changes_nothing(nano, rng):
    config, weights = nano
    tokens = rng.integers(2, 23, (2, 6))

    def total(w, remat):
        ones = jnp.ones_like(tokens)
        return jnp.sum(transformer.hidden(w, config, tokens, ones, remat=remat)[0] ** 2)

    plain, again = (jax.grad(total)(weights, remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def dense_head(hidden, weight, targets, temperature):
    logp = jax.nn.log_softmax(hidden @ weight.T / temperature)
    return jnp.take_along_axis(logp, targets[:, None], -1)[:, 0], -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 3, 8, 64])
@pytest.mark.parametrize("masked_in", [0, 1, 13, 20])
def test_head_equals_dense_softmax(chunk, masked_in, rng, monkeypatch):
    """Values and gradients for any chunk size and any mask, holes and none at all included.

    The weight's gradient is of one part, or of four that are added one after the other.
    """
    monkeypatch.setattr(head, "PRODUCT", 30 if chunk in (3, 64) else 120)
    with jax.enable_x64(True):
        hidden, weight = rng.normal(size=(20, 6)), rng.normal(size=(20, 6))
        targets = jnp.asarray(rng.integers(0, 20, 20), jnp.int32)
        mask = jnp.isin(jnp.arange(20), rng.permutation(20)[:masked_in])
        source = jnp.asarray(rng.integers(0, 20, 20), jnp.int32)  # several from one hidden state
        tokens = head.Tokens(targets, source, mask)
        a, b = rng.normal(size=(2, 20))
        temperature = 0.7

        def chunked(h, w):
            outs = head.logp_entropy(
                jnp.float32(h), jnp.float32(w), tokens, jnp.float32(temperature), chunk
            )
            return jnp.sum(outs[0] * a + outs[1] * b), outs

        def by_token(h, w):
            arguments = jnp.float32(h), jnp.float32(w), tokens, jnp.float32(temperature)
            each = (lambda logp, own: logp * own[0]), (jnp.float32(a), None)
            total, *outs = head.token_loss(*each, *arguments, chunk)
            return total, tuple(outs)

        def dense(h, w, b=b):
            outs = dense_head(h[source], w, targets, temperature)
            outs = tuple(jnp.where(mask, x, 0) for x in outs)
            return jnp.sum(outs[0] * a + outs[1] * b), outs

        for ours, theirs in ((chunked, dense), (by_token, partial(dense, b=0))):
            got, expected = (
                jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(jnp.asarray(hidden), weight)
                for f in (ours, theirs)
            )
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, expected)


@pytest.mark.parametrize("preset", sorted(model.PRESETS))
def test_presets_have_their_published_sizes(preset):
    published = {"qwen3_0_6b": 0.596, "qwen3_1_7b": 1.72, "qwen3_4b": 4.02, "qwen3_8b": 8.19}
    published |= {"qwen3_30b_a3b": 30.5, "qwen3_vl_30b_a3b": 31.1}
    if preset in published:
        count = params.count(model.make(preset)) / 1e9
        assert count == pytest.approx(published[preset], rel=3e-3)
    else:
        assert 5e4 < params.count(model.make(preset, vocab_size=16)) < 1e7


@pytest.mark.slow
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
    ({"model_type": "gpt2"}, "qwen3, qwen3_moe, qwen2, llama"),
    ({"num_experts": 4}, "num_experts=4: .* 'qwen3_moe'"),
    ({"model_type": "qwen3_vl"}, "vision=None: must be set for the model_type 'qwen3_vl'"),
    ({"model_type": "qwen3_moe"}, "num_experts=0"),
    ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "1, num_experts=4"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "default, linear, llama3, yarn"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "knows no beta"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_wrong_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        model.make("nano", vocab_size=23, **fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'qwen3_8b'"):
        model.make("qwen3_9b")


LOWER_AN_UPDATE = """
import hashlib
import jax.numpy as jnp
from sapo_jax import learner, model, objectives
from sapo_jax.types import Batch

config = model.make("nano_moe", vocab_size=23, decoder_sparse_step=2)  # dense and sparse layers
hp = learner.Hyperparameters(objectives.resolve("sapo"), 1e-3, 0.0, 1.0, 1.0, model=config)
ids, mask, logp = (jnp.zeros((2, 8), dtype) for dtype in (jnp.int32, bool, jnp.float32))
batch = Batch(ids, mask, ids, logp, logp, jnp.zeros(2))
text = learner.update.lower(learner.abstract(hp), batch, hp).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.slow
def test_programs_do_not_depend_on_the_hash_seed():
    """Names of layers taken out of a set came in another order in each process: on several hosts
    the programs then differ, and no compilation is found in the cache."""

    def start(seed):
        return subprocess.Popen(
            [sys.executable, "-c", LOWER_AN_UPDATE], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONHASHSEED": str(seed)}, cwd=pathlib.Path(__file__).parents[2],
        )  # fmt: skip

    texts = [process.communicate()[0] for process in [start(seed) for seed in range(3)]]
    assert len(set(texts)) == 1, texts
    assert len(texts[0].strip()) == 64
