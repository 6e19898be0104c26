"""config.json and its neighbours in a Hugging Face directory, to and from a ModelConfig."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

from sapo_jax.data import hf_json
from sapo_jax.model import hf_vision
from sapo_jax.model.config import MODEL_TYPES, ModelConfig, VisionConfig
from sapo_jax.model.rope import SCALINGS

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
REFUSED = {  # field: the values of it that this model computes
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
LAYER_TYPES = {"full_attention", "sliding_attention"}
DEFAULTS = {  # of fields that config.json lacks, as transformers 5.23.0 has them
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    "qwen3_moe": {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "llama": {"max_position_embeddings": 2048},
    "qwen3_vl": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000},
    "qwen3_vl_moe": {
        "num_key_value_heads": 16, "max_position_embeddings": 128000, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    },
}  # fmt: skip
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


def _rope(path: pathlib.Path, found: dict[str, Any], context: int) -> tuple[float, dict[str, Any]]:
    """θ and scaling; ``rope_scaling`` hides ``rope_parameters``, as in ``transformers``."""
    given = found.get("rope_scaling") or found.get("rope_parameters") or {}
    values = {k: v for k, v in given.items() if v is not None and k != "type"}
    if nested := [k for k, v in values.items() if isinstance(v, dict)]:
        raise ValueError(f"{path}: rope_parameters by kind of layer ({nested[0]}) is not supported")
    values.setdefault("rope_type", given.get("type", "default"))
    theta = values.pop("rope_theta", found.get("rope_theta")) or 10_000.0
    if values.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor other than 1 is not supported")
    kind, original = values["rope_type"], "original_max_position_embeddings"
    if kind in ("llama3", "yarn"):
        values[original] = found.get(original) or values.get(original, context)
    if kind == "yarn":
        values.setdefault("factor", context / values[original])
    if kind == "default":
        return theta, {}
    # Files carry parameters of other types along; what a type does not know changes nothing.
    known = set().union({"rope_type"}, *SCALINGS.get(kind, ()))
    return theta, {k: v for k, v in values.items() if k in known or kind not in SCALINGS}


def _check_windows(path: pathlib.Path, found: dict[str, Any], context: int) -> None:
    """Refuse layers of other kinds, and a window that a row can outgrow in one that slides."""
    kinds, layers = found.get("layer_types"), found["num_hidden_layers"]
    if kinds and (len(kinds) != layers or not {*kinds} <= LAYER_TYPES):
        raise ValueError(
            f"{path}: layer_types={kinds!r:.100} is not supported: must be num_hidden_layers="
            f"{layers} of {', '.join(sorted(LAYER_TYPES))}"
        )
    if found["model_type"] == "llama" or not found.get("use_sliding_window"):
        return
    if found["model_type"] == "qwen3_moe":
        slides = True
    elif kinds:
        slides = any(kind != "full_attention" for kind in kinds)
    else:
        first = found.get("max_window_layers")
        slides = (28 if first is None else first) < layers
    window = found.get("sliding_window", 4096)
    if slides and window is not None and window < context:
        raise ValueError(
            f"{path}: use_sliding_window=True with sliding_window={window} is not supported: must "
            f"be at least max_position_embeddings={context}"
        )


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _tokens(directory: pathlib.Path, found: dict[str, Any], vocab: int) -> tuple[tuple, int]:
    """Stop tokens and pad token: generation_config.json decides before config.json."""
    path = directory / "generation_config.json"
    generation = hf_json.read(path) if path.is_file() else {}
    sources = (generation, found)
    stop = next((s for s in (_as_tuple(x.get("eos_token_id")) for x in sources) if s), ())
    if stop and max(stop) >= vocab:
        raise ValueError(
            f"{directory}: eos_token_id={max(stop)}: must be in [0, vocab_size={vocab})"
        )
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
    content = hf_json.read(path)
    try:
        entries = content.get("model", {}).get("vocab", {})
        ids = list(entries.values()) if isinstance(entries, dict) else [len(entries) - 1]
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        fits = max(ids, default=0) < vocab
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer: {type(error).__name__}: {error}") from None
    if not fits:
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
    found = hf_json.read(path)
    kind = found.get("model_type")
    if kind not in MODEL_TYPES:
        names = found.get("architectures")
        raise ValueError(
            f"{path}: model_type={kind!r} (architectures {names}): must be one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    vision = None
    if kind in hf_vision.KINDS:
        beside = [directory / name for name in hf_vision.PROCESSORS]
        processor = next((hf_json.read(file) for file in beside if file.is_file()), {})
        found, vision = hf_vision.read(path, found, processor.get("image_processor", processor))
    for field, allowed in REFUSED.items():
        if found.get(field) not in allowed:
            raise ValueError(f"{path}: {field}={found[field]!r} is not supported")
    if kind == "llama" and found.get("mlp_bias"):
        raise ValueError(f"{path}: mlp_bias={found['mlp_bias']!r} is not supported")
    missing = [name for name in REQUIRED if found.get(name) is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    if found.get("num_local_experts") is not None:  # its name inside transformers
        found["num_experts"] = found["num_local_experts"]
    heads = found["num_attention_heads"]
    fields = {
        "num_key_value_heads": heads,
        "head_dim": found["hidden_size"] // heads,
        "tie_word_embeddings": False,
    }
    fields |= {name: value for name, value in DEFAULTS[kind].items() if name not in found}
    names = SAME + EXPERTS if kind.endswith("_moe") else SAME
    fields |= {name: found[name] for name in names if found.get(name) is not None}
    context = fields.setdefault("max_position_embeddings", 32768)
    _check_windows(path, found, context)
    fields["rope_theta"], fields["rope_scaling"] = _rope(path, found, context)
    vocab, bos = found["vocab_size"], found.get("bos_token_id")
    fields["stop_tokens"], fields["pad_token"] = _tokens(directory, found, vocab)
    fields["bos_token"] = bos if isinstance(bos, int) else None
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), dtype)
    try:
        fields["vision"] = None if vision is None else VisionConfig(**vision)
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
    if config.bos_token is not None:
        content["bos_token_id"] = config.bos_token
    if config.num_experts:
        content |= {name: getattr(config, name) for name in EXPERTS}
        content["mlp_only_layers"] = list(config.mlp_only_layers)
    return hf_vision.to_json(config, content) if config.vision else content
