"""Hugging Face directories in spellings that transformers reads besides those that it writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from sapo_jax import model
from tests.model.test_hf import change_config, change_tensors, fuse, strip, write_recorded

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
SLIDING = {"use_sliding_window": True, "sliding_window": 63}


def scaled(theta, given, **more):
    pairs = {k: v for k, v in given.items() if k != "type"} | more
    return {"rope_theta": theta, "rope_scaling": tuple(sorted(pairs.items()))}


ABSENT = dict.fromkeys(("head_dim", "num_key_value_heads", "max_position_embeddings"), "absent")
NO_EXPERTS = dict.fromkeys(
    ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
     "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"), "absent",
)  # fmt: skip
SPELLINGS = [  # recorded model, what its config.json says, what transformers 5.23.0 reads there
    ("qwen3_tied", {"rope_scaling": YARN, "rope_theta": 5e3}, scaled(5e3, YARN)),
    ("qwen3_tied", {"rope_scaling": YARN, "rope_parameters": PLAIN}, scaled(1e4, YARN)),
    ("qwen3_yarn", {"rope_scaling": LINEAR}, scaled(1e4, LINEAR, rope_type="linear")),
    ("qwen3_yarn", {"rope_scaling": {"type": "default"}}, {"rope_theta": 1e4, "rope_scaling": ()}),
    ("qwen3_yarn", {"rope_scaling": {}, "rope_theta": 50.0}, {}),
    ("qwen3_yarn", {"rope_scaling": None}, {}),
    ("qwen3_tied", {"rope_scaling": YARN | {"rope_theta": 7.0}, "rope_theta": 5e3},
     scaled(7.0, YARN)),
    ("qwen3_tied", {"rope_parameters": YARN, "original_max_position_embeddings": 16},
     scaled(1e4, YARN, original_max_position_embeddings=16)),
    ("llama_llama3", {"rope_scaling": LLAMA3, "rope_theta": 100.0},
     scaled(100.0, LLAMA3, rope_type="llama3", original_max_position_embeddings=64)),
    ("qwen3_tied", {"rope_parameters": "absent", "rope_theta": "absent"}, {"rope_theta": 1e4}),
    ("qwen3_tied", {"hidden_act": "swish"}, {}),
    ("moe", {"hidden_act": "swish", "mlp_bias": True}, {}),
    ("qwen3_tied", ABSENT, {"head_dim": 128, "num_key_value_heads": 32, "num_attention_heads": 32,
                            "max_position_embeddings": 32768}),
    ("qwen2_tied", ABSENT, {"head_dim": 2, "num_key_value_heads": 32, "num_attention_heads": 32,
                            "hidden_size": 64, "max_position_embeddings": 32768}),
    ("moe", ABSENT, {"head_dim": 8, "num_key_value_heads": 4, "max_position_embeddings": 32768}),
    ("llama_bias", ABSENT, {"head_dim": 8, "max_position_embeddings": 2048}),
    ("qwen3_tied", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ("moe", NO_EXPERTS, {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False,
                         "moe_intermediate_size": 768}),
    ("moe", {"num_experts": 4, "num_local_experts": 6}, {"num_experts": 6}),
    ("qwen3_tied", SLIDING | {"sliding_window": 64, "max_window_layers": 0}, {}),
    ("qwen3_tied", SLIDING | {"sliding_window": None, "max_window_layers": 0}, {}),
    ("qwen3_tied", SLIDING | {"layer_types": ["full_attention"] * 3}, {}),
    ("qwen3_tied", {"sliding_window": 4}, {}),
    ("qwen2_tied", SLIDING | {"layer_types": None}, {}),
    ("qwen2_tied", SLIDING | {"layer_types": None, "max_window_layers": 3}, {}),
    ("moe", SLIDING | {"sliding_window": 64}, {}),
    ("llama_bias", SLIDING, {}),
    ("qwen3_tied", {"bos_token_id": 3}, {"bos_token": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said", "read"), SPELLINGS)
def test_a_config_means_what_transformers_reads_in_it(name, said, read, tmp_path):
    write_recorded(name, tmp_path)
    before = model.hf_config.read(tmp_path, "float32")
    sizes = {k: v for k, v in read.items() if k in ("num_attention_heads", "hidden_size")}
    change_config(**said, **sizes)(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert model.hf_config.read(tmp_path, "float32") == dataclasses.replace(before, **read)


@pytest.mark.parametrize("layers", [["sliding_attention"] * 3, None])
def test_a_window_that_rows_outgrow_is_refused(layers, tmp_path):
    write_recorded("qwen3_tied", tmp_path)
    change_config(**SLIDING, layer_types=layers, max_window_layers=2)(tmp_path)
    with pytest.raises(ValueError, match=r"sliding_window=63 .*max_position_embeddings=64"):
        model.hf.load(tmp_path)


def shards(content, directory):
    """Two files, and an index that says for every tensor the wrong one."""
    (directory / "model.safetensors").unlink()
    names = [f"model-{n}-of-2.safetensors" for n in (1, 2)]
    for n, name in enumerate(names):
        part = {k: v for i, (k, v) in enumerate(content.items()) if i % 2 == n}
        safetensors.numpy.save_file(part, directory / name)
    places = {k: names[(i + 1) % 2] for i, k in enumerate(content)}
    places.pop("model.norm.weight")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def stale_index(content, directory):
    places = dict.fromkeys(content, "model-00001-of-00009.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def copy_head(content):
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)


def move_head(content):
    content["lm_head.weight"] = content.pop("model.embed_tokens.weight")


def other_head(content):
    content["lm_head.weight"] = content["model.embed_tokens.weight"] * np.float32(2)


WEIGHTS = {
    "a stale index": ("qwen3_tied", stale_index),
    "a wrong index": ("qwen3_tied", shards),
    "no prefix": ("qwen3_untied_one_kv_head", strip),
    "no prefix, tied": ("llama_tied_three_heads", strip),
    "some with a prefix": ("qwen2_tied", lambda c: strip(c, "model.layers.1")),
    "no prefix, experts": ("moe", strip),
    "fused": ("moe", fuse),
    "fused in a layer": ("moe", lambda c: fuse(c, of=(1,))),
    "fused above": ("moe", lambda c: fuse(c, down=False)),
    "fused below": ("moe", lambda c: fuse(c, up=False)),
    "fused, no prefix": ("moe", lambda c: (fuse(c), strip(c))),
    "a copy of the embedding": ("qwen3_tied", copy_head),
    "the head alone": ("qwen3_tied", move_head),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_found_as_transformers_finds_them(name, tmp_path):
    recorded, edit = WEIGHTS[name]
    write_recorded(recorded, tmp_path)
    before = model.hf.load(tmp_path)
    if edit in (stale_index, shards):
        edit(safetensors.numpy.load_file(tmp_path / "model.safetensors"), tmp_path)
    else:
        change_tensors(edit)(tmp_path)
    after = model.hf.load(tmp_path)
    assert model.hf.read_config(tmp_path, "float32") == after[0] == before[0]
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tied_model_keeps_a_head_of_its_own(prefix, tmp_path):
    """The head is what was trained; the word in config.json is what was copied."""
    write_recorded("qwen3_tied", tmp_path)
    change_tensors(lambda c: (other_head(c), prefix or strip(c)))(tmp_path)
    config, weights = model.hf.load(tmp_path)
    assert not config.tie_word_embeddings
    assert model.hf.read_config(tmp_path, "float32") == config
    np.testing.assert_array_equal(weights["head"], 2 * weights["embed"])
    model.hf.save(tmp_path / "out", config, weights)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    (tmp_path / "model.safetensors").unlink()  # a shape alone, for random parameters
    assert model.hf.read_config(tmp_path, "float32").tie_word_embeddings


def test_a_saved_directory_keeps_what_came_with_the_model(tmp_path):
    """The begin of a text, and the templates besides the default one."""
    write_recorded("llama_bias", tmp_path)
    change_config(bos_token_id=3)(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for _ in range(2):  # again into the same directory
        model.hf.save(tmp_path / "out", *model.hf.load(tmp_path), files_from=tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 3
    assert model.hf.load(tmp_path / "out")[0].bos_token == 3
    saved = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert saved.read_text() == "tools"
