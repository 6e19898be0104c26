"""FLOPs of the model alone, whatever a program executes."""

from __future__ import annotations

import math

import jax

from sapo_jax.model import ModelConfig, params
from sapo_jax.training.settings import Settings


def matmuls(config: ModelConfig, tokens: int, logits: int) -> float:
    """Of tokens through the layers and rows of logits, without attention.

    2 for each parameter that a token meets, experts by their share.
    """
    share = config.num_experts_per_tok / max(1, config.num_experts)
    layers = 2 * sum(
        int(math.prod(spec.shape) * len(spec.layers) * (share if "experts" in spec.axes else 1))
        for spec in params.layer_table(config).values()
        if spec.fan_in
    )
    return tokens * layers + logits * 2 * config.vocab_size * config.hidden_size


def forward(config: ModelConfig, tokens: int, keys: float, logits: int) -> float:
    """`matmuls`, and of each token's attention to so many keys."""
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return matmuls(config, tokens, logits) + tokens * attention


def tower(settings: Settings, prompts: int) -> float:
    """Of the tower, once over as many images as prompts have room for, each prompt's as one."""
    config, room = settings.model, settings.images
    if room is None:
        return 0.0
    vision, patches = config.vision, room.tokens * config.vision.merged
    matrices = [s for s in jax.tree.leaves(params.table(config)["vision"]) if s.transposed]
    shares = [vision.merged if "merger" in s.hf_name else 1 for s in matrices]  # of a token
    met = sum(math.prod(s.shape) / n for s, n in zip(matrices, shares, strict=True))
    attention = 4 * vision.depth * vision.hidden_size * patches
    return prompts * patches * (2 * met + attention)
