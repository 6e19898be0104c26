"""config.json and its neighbours in a Hugging Face directory, to and from a ModelConfig."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

from sapo_jax.model.config import MODEL_TYPES, ModelConfig
from sapo_jax.model.rope import SCALINGS

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
REFUSED = {  # field: the values of it that this model computes
    "use_sliding_window": (False, None),
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
EXPERTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip
REQUIRED = SAME[:5]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a Hugging Face model directory has one")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, must be an object")
    return content


def _rope(path: pathlib.Path, found: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """θ and scaling, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    given = found.get("rope_parameters") or found.get("rope_scaling") or {}
    values = {k: v for k, v in given.items() if v is not None and k != "type"}
    values.setdefault("rope_type", given.get("type", "default"))
    theta = values.pop("rope_theta", found.get("rope_theta")) or 10_000.0
    if values.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor other than 1 is not supported")
    kind, context = values["rope_type"], found.get("max_position_embeddings")
    if kind in ("llama3", "yarn") and context:
        values.setdefault("original_max_position_embeddings", context)
    if kind == "yarn" and context:
        values.setdefault("factor", context / values["original_max_position_embeddings"])
    if kind == "default":
        return theta, {}
    # Files carry parameters of other types along; what a type does not know changes nothing.
    known = set().union({"rope_type"}, *SCALINGS.get(kind, ()))
    return theta, {k: v for k, v in values.items() if k in known or kind not in SCALINGS}


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _tokens(directory: pathlib.Path, found: dict[str, Any], vocab: int) -> tuple[tuple, int]:
    """Stop tokens and pad token: generation_config.json decides before config.json."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    sources = (generation, found)
    stop = next((s for s in (_as_tuple(x.get("eos_token_id")) for x in sources) if s), ())
    if not stop:
        warnings.warn(
            f"{directory}: no eos_token_id; token {vocab - 1} is taken to end a text", stacklevel=4
        )
        stop = (vocab - 1,)
    pads = [x.get("pad_token_id") for x in sources]
    pad = next((p for p in pads if p is not None and 0 <= p < vocab), stop[0])
    return stop, pad


def _check_tokenizer(directory: pathlib.Path, vocab: int) -> None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    content = read_json(path)
    entries = content.get("model", {}).get("vocab", {})
    ids = list(entries.values()) if isinstance(entries, dict) else [len(entries) - 1]
    ids += [token["id"] for token in content.get("added_tokens", ())]
    if ids and max(ids) >= vocab:
        raise ValueError(
            f"{path}: the tokenizer's largest id is {max(ids)}, the model's vocabulary has "
            f"{vocab} entries: they do not belong together"
        )


def read(directory: pathlib.Path, dtype: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory, with ``dtype`` for all three dtypes.

    Raises:
      ValueError: a missing file or field, an architecture or option that is not supported, or a
        tokenizer that the vocabulary does not cover.
    """
    path = directory / "config.json"
    found = read_json(path)
    kind = found.get("model_type")
    if kind not in MODEL_TYPES:
        names = found.get("architectures")
        raise ValueError(
            f"{path}: model_type={kind!r} (architectures {names}): must be one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    for field, allowed in REFUSED.items():
        if found.get(field) not in allowed:
            raise ValueError(f"{path}: {field}={found[field]!r} is not supported")
    missing = [name for name in REQUIRED if found.get(name) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    heads = found["num_attention_heads"]
    fields = {
        "num_key_value_heads": heads,
        "head_dim": found["hidden_size"] // heads,
        "tie_word_embeddings": False,
    }
    fields |= {name: found[name] for name in SAME if found.get(name) is not None}
    if kind == "qwen3_moe":
        experts = {"num_experts": found.get("num_local_experts"), "norm_topk_prob": False}
        experts |= {name: found[name] for name in EXPERTS if found.get(name) is not None}
        fields |= {name: value for name, value in experts.items() if value is not None}
    fields["rope_theta"], fields["rope_scaling"] = _rope(path, found)
    vocab = found["vocab_size"]
    fields["stop_tokens"], fields["pad_token"] = _tokens(directory, found, vocab)
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), dtype)
    try:
        config = ModelConfig(model_type=kind, **fields, **dtypes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_tokenizer(directory, vocab)
    return config


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, as ``transformers`` 4 and 5 read it."""
    scaling = {"rope_type": "default", **dict(config.rope_scaling)}
    stop = list(config.stop_tokens)
    content = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SAME},
        "hidden_act": "silu",
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling else None,
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
        "pad_token_id": config.pad_token,
        "torch_dtype": config.param_dtype,
    }
    if config.num_experts:
        content |= {name: getattr(config, name) for name in EXPERTS}
        content["mlp_only_layers"] = list(config.mlp_only_layers)
    return content
