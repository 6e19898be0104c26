"""What config.json of a model that sees holds beside its text model, and its image processor."""

from __future__ import annotations

import pathlib
from typing import Any

from sapo_jax.model.config import ModelConfig, VisionConfig

KINDS = ("qwen3_vl", "qwen3_vl_moe")
PROCESSORS = "preprocessor_config.json", "processor_config.json"  # versions 4 and 5
SAME = (
    "depth", "hidden_size", "intermediate_size", "num_heads", "num_position_embeddings",
    "deepstack_visual_indexes", "patch_size", "temporal_patch_size", "in_channels",
    "spatial_merge_size",
)  # fmt: skip
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
DEFAULTS = {  # of fields that vision_config lacks, as transformers 5.23.0 has them
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "deepstack_visual_indexes": (8, 16, 24), "out_hidden_size": 3584,
}  # fmt: skip
ROPE = {"rope_type": "axial", "rope_theta": 10_000.0}


def read(
    path: pathlib.Path, found: dict[str, Any], processor: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the text model as one of text has them, and those of `VisionConfig`.

    Args:
      path: of config.json, for messages.
      found: its content.
      processor: that of preprocessor_config.json, or of "image_processor" in its successor.

    Raises:
      ValueError: an option that is not supported.
    """
    parts = {}
    for part in ("text_config", "vision_config"):
        parts[part] = found.get(part) or {}
        if not isinstance(parts[part], dict):
            raise ValueError(f"{path}: {part}={parts[part]!r} must be an object")
    text, own = found | parts["text_config"], DEFAULTS | parts["vision_config"]
    text["tie_word_embeddings"] = found.get("tie_word_embeddings", False)
    text.setdefault("rope_theta", 500_000.0)
    text["norm_topk_prob"] = True  # whatever the file says
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    turns = ROPE | (own.get("rope_parameters") or {})
    refused = {
        "vision_config.hidden_act": (own.get("hidden_act"), ("gelu_pytorch_tanh", None)),
        "vision_config.out_hidden_size": (own["out_hidden_size"], (text.get("hidden_size"),)),
        "vision_config.rope_parameters": (turns, (ROPE,)),
        "mrope_interleaved": (rope.get("mrope_interleaved"), (True, None)),
        "image_mean": (processor.get("image_mean"), ([0.5] * 3, None)),
        "image_std": (processor.get("image_std"), ([0.5] * 3, None)),
    }
    for field, (value, allowed) in refused.items():
        if value not in allowed:
            raise ValueError(f"{path}: {field}={value!r} is not supported: must be {allowed[0]!r}")
    fields = {name: own[name] for name in SAME if own.get(name) is not None}
    fields |= {name: found[name] for name in TOKENS if found.get(name) is not None}
    if rope.get("mrope_section"):
        fields["mrope_section"] = rope["mrope_section"]
    size = processor.get("size") or {}
    for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if value := processor.get(field) or size.get(edge):
            fields[field] = value
    return text, fields


def to_json(config: ModelConfig, text: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, given that of a text model."""
    vision, kind = config.vision, config.model_type
    sections = {"mrope_section": list(vision.mrope_section), "mrope_interleaved": True}
    text["rope_parameters"] |= sections
    # Version 4 reads the sections here, and version 5 reads rope_scaling before rope_parameters.
    text["rope_scaling"] = text["rope_parameters"]
    own = {name: getattr(vision, name) for name in SAME}
    own |= {"deepstack_visual_indexes": list(vision.deepstack_visual_indexes)}
    return {
        "architectures": text.pop("architectures"),
        "model_type": kind,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.param_dtype,
        **{name: getattr(vision, name) for name in TOKENS},
        "text_config": text | {"model_type": f"{kind}_text"},
        "vision_config": {
            "model_type": kind,  # both versions know it under this name
            "hidden_act": "gelu_pytorch_tanh",
            "out_hidden_size": config.hidden_size,
            **own,
        },
    }


def processor(vision: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
