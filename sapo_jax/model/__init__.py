"""The policy: Qwen3-architecture decoders as plain pytrees and pure functions."""

from sapo_jax.model.config import PRESETS, ModelConfig, make
from sapo_jax.model.transformer import logits

__all__ = ["PRESETS", "ModelConfig", "logits", "make"]
