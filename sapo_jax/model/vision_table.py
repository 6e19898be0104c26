"""The part of the parameter table that models that see have: the tower, under "vision".

``{"patch", "positions", "blocks": {name: [depth, ...]}, "merger", "deepstack": {name: [J, ...]}}``,
and biases. On a mesh it lies as the decoder does: split over `fsdp` along widths, over `tensor`
along heads and the inner widths of MLPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sapo_jax.model.config import ModelConfig
from sapo_jax.model.spec import Spec


def _linear(name: str, hf_name: str, shape, axes, inputs: int = 1, **own) -> dict[str, Spec]:
    """A weight, whose first axes are the inputs, and its bias."""
    fan_in = math.prod(shape[:inputs]) if inputs else 0
    weight = Spec(shape, axes, f"{hf_name}.weight", fan_in, **own)
    bias = Spec(shape[inputs:], axes[inputs:], f"{hf_name}.bias", scale=0.0)
    return {name: weight, f"{name}_bias": bias}


def _norm(name: str, hf_name: str, width: int) -> dict[str, Spec]:
    return _linear(name, hf_name, (width,), ("embed",), 0)


def _mlp(hf_name: str, sizes: tuple[int, int, int], **own) -> dict[str, Spec]:
    return {
        **_linear("fc1", f"{hf_name}linear_fc1", sizes[:2], ("embed", "mlp")),
        **_linear("fc2", f"{hf_name}linear_fc2", sizes[1:], ("mlp", "embed"), **own),
    }


def vision_table(config: ModelConfig) -> dict[str, Any]:
    """Its Specs; those of blocks and deepstack mergers without their leading axis."""
    vision, at = config.vision, "model.visual."
    d, h, p = vision.hidden_size, vision.num_heads, vision.patch_size
    wide, out = d * vision.merged, config.hidden_size
    kernel = vision.in_channels, vision.temporal_patch_size, p, p
    residual = {"scale": 1 / math.sqrt(2 * vision.depth)}  # as in the decoder
    block, taps = at + "blocks.{}.", at + "deepstack_merger_list.{}."
    axes, positions = ("embed", "qkv", "heads", "head_dim"), (vision.num_position_embeddings, d)
    blocks = {
        **_norm("norm1", block + "norm1", d),
        **_linear("qkv", block + "attn.qkv", (d, 3, h, d // h), axes),
        **_linear("proj", block + "attn.proj", (h, d // h, d), (*axes[2:], "embed"), 2, **residual),
        **_norm("norm2", block + "norm2", d),
        **_mlp(block + "mlp.", (d, vision.intermediate_size, d), **residual),
    }
    deepstack = _norm("norm", taps + "norm", wide) | _mlp(taps, (wide, wide, out))
    top = _linear(
        "patch", at + "patch_embed.proj", (math.prod(kernel), d), ("patch", "embed"), kernel=kernel
    )
    top["positions"] = Spec(positions, ("positions", "embed"), at + "pos_embed.weight", d)
    top["merger"] = _norm("norm", at + "merger.norm", d) | _mlp(at + "merger.", (wide, wide, out))
    count = len(vision.deepstack_visual_indexes)
    for name, specs, size in (("blocks", blocks, vision.depth), ("deepstack", deepstack, count)):
        layers = tuple(range(size))
        if layers:
            top[name] = {n: dataclasses.replace(spec, layers=layers) for n, spec in specs.items()}
    return top
