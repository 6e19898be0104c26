"""What config.json of a model that sees holds beside its text model, and its image processor."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from sapo_jax.model.config import TOWER, ModelConfig, VisionConfig

KINDS = ("qwen3_vl", "qwen3_vl_moe")
PROCESSORS = "preprocessor_config.json", "processor_config.json"  # versions 4 and 5
PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
FIELDS = [field.name for field in dataclasses.fields(VisionConfig)]
TOKENS = [name for name in FIELDS if name.endswith("_token_id")]
SAME = [name for name in FIELDS if name not in (*TOKENS, *PIXELS, "mrope_section")]
DEFAULTS = {name: getattr(TOWER, name) for name in SAME} | {"out_hidden_size": 3584}  # of 5.23.0
ROPE = {"rope_type": "axial", "rope_theta": 10_000.0}
HALF = [0.5] * 3


def read(
    path: pathlib.Path, found: dict[str, Any], processor: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as a model of text alone has it, and the fields of `VisionConfig`.

    Args:
      path: of config.json, for messages.
      found: its content.
      processor: that of the first of PROCESSORS, or of "image_processor" in the second.

    Raises:
      ValueError: an option that is not supported.
    """
    parts = [found.get(name) or {} for name in ("text_config", "vision_config")]
    text, own = {"rope_theta": 500_000.0} | found | parts[0], dict(DEFAULTS)
    own |= {name: value for name, value in parts[1].items() if value is not None}
    text["tie_word_embeddings"] = found.get("tie_word_embeddings", False)
    text["norm_topk_prob"] = True  # whatever the file says
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    for field, value, allowed in (
        ("vision_config.hidden_act", own.get("hidden_act"), "gelu_pytorch_tanh"),
        ("vision_config.out_hidden_size", own["out_hidden_size"], text.get("hidden_size")),
        ("vision_config.rope_parameters", ROPE | (own.get("rope_parameters") or {}), ROPE),
        ("mrope_interleaved", rope.get("mrope_interleaved"), True),
        ("image_mean", processor.get("image_mean"), HALF),
        ("image_std", processor.get("image_std"), HALF),
    ):
        if value not in (allowed, None):
            raise ValueError(f"{path}: {field}={value!r} is not supported: must be {allowed!r}")
    limits = processor.get("size") or {}
    limits = {name: processor.get(name) or limits.get(edge) for name, edge in PIXELS.items()}
    fields = {name: own.get(name) for name in SAME} | {name: found.get(name) for name in TOKENS}
    fields |= {"mrope_section": rope.get("mrope_section"), **limits}
    return text, {name: value for name, value in fields.items() if value is not None}


def to_json(config: ModelConfig, text: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, given that of a text model."""
    vision, kind = config.vision, config.model_type
    sections = {"mrope_section": vision.mrope_section, "mrope_interleaved": True}
    # Version 4 looks for the sections in rope_scaling, which version 5 reads before the other.
    text["rope_scaling"] = text["rope_parameters"] = text["rope_parameters"] | sections
    own = {name: getattr(vision, name) for name in SAME}
    own |= {"hidden_act": "gelu_pytorch_tanh", "out_hidden_size": config.hidden_size}
    return {
        "architectures": text.pop("architectures"),
        "model_type": kind,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.param_dtype,
        **{name: getattr(vision, name) for name in TOKENS},
        "text_config": text | {"model_type": f"{kind}_text"},
        "vision_config": own | {"model_type": kind},  # a name that both versions know
    }


def processor(vision: VisionConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {edge: getattr(vision, name) for name, edge in PIXELS.items()},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": HALF,
        "image_std": HALF,
    }
