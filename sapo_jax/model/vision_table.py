"""The part of the parameter table that models that see have: the tower under "vision".

``{"patch", "positions", "blocks": {name: [depth, ...]}, "merger", ["deepstack": {name: [J,
...]}]}`` and biases. On a mesh it lies as the decoder does: split over `fsdp` along its widths,
over `tensor` along heads and the inner widths of MLPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sapo_jax.model.config import ModelConfig
from sapo_jax.model.spec import Spec


def _linear(shape, axes, name: str, fan_in: int, scale: float = 1.0, **own) -> dict[str, Spec]:
    """A weight and its bias; inputs are the first axes, up to ``fan_in``."""
    sizes = [math.prod(shape[:i]) for i in range(len(shape))]
    out = sizes.index(fan_in)
    return {
        "": Spec(shape, axes, f"{name}.weight", fan_in, scale, **own),
        "_bias": Spec(shape[out:], axes[out:], f"{name}.bias", scale=0.0),
    }


def _norm(width: int, name: str) -> dict[str, Spec]:
    weight = Spec((width,), ("embed",), f"{name}.weight")
    return {"": weight, "_bias": dataclasses.replace(weight, hf_name=f"{name}.bias", scale=0.0)}


def _named(**parts: dict[str, Spec]) -> dict[str, Spec]:
    return {name + end: spec for name, part in parts.items() for end, spec in part.items()}


def _merger_table(name: str, width: int, normed: int, out: int) -> dict[str, Spec]:
    return _named(
        norm=_norm(normed, f"{name}.norm"),
        fc1=_linear((width, width), ("embed", "mlp"), f"{name}.linear_fc1", width),
        fc2=_linear((width, out), ("mlp", "embed"), f"{name}.linear_fc2", width),
    )


def vision_table(config: ModelConfig) -> dict[str, Any]:
    """Its Specs; those of blocks and deepstack mergers without their leading axis."""
    vision, at = config.vision, "model.visual."
    d, f, h = vision.hidden_size, vision.intermediate_size, vision.num_heads
    hd, table_axes = d // h, ("positions", "embed")
    size, t = vision.patch_size, vision.temporal_patch_size
    residual = 1 / math.sqrt(2 * vision.depth)
    block, qkv = at + "blocks.{}.", ("embed", "qkv", "heads", "head_dim")
    blocks = _named(
        norm1=_norm(d, block + "norm1"),
        qkv=_linear((d, 3, h, hd), qkv, block + "attn.qkv", d),
        proj=_linear((h, hd, d), (*qkv[2:], "embed"), block + "attn.proj", d, residual),
        norm2=_norm(d, block + "norm2"),
        fc1=_linear((d, f), ("embed", "mlp"), block + "mlp.linear_fc1", d),
        fc2=_linear((f, d), ("mlp", "embed"), block + "mlp.linear_fc2", f, residual),
    )
    wide, out = d * vision.merged, config.hidden_size
    deepstack = _merger_table(at + "deepstack_merger_list.{}", wide, wide, out)
    patch = _linear(
        (vision.patch_dim, d), ("patch", "embed"), at + "patch_embed.proj", vision.patch_dim,
        kernel=(vision.in_channels, t, size, size),
    )  # fmt: skip
    found = _named(patch=patch) | {
        "positions": Spec(
            (vision.num_position_embeddings, d), table_axes, at + "pos_embed.weight", d
        ),
        "blocks": blocks,
        "merger": _merger_table(at + "merger", wide, d, out),
        "deepstack": deepstack,
    }
    for name, count in (
        ("blocks", vision.depth),
        ("deepstack", len(vision.deepstack_visual_indexes)),
    ):
        layers = tuple(range(count))
        found[name] = {n: dataclasses.replace(s, layers=layers) for n, s in found[name].items()}
    if not vision.deepstack_visual_indexes:
        del found["deepstack"]
    return found
