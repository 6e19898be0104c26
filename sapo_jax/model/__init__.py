"""The policy: Qwen and Llama decoders as plain pytrees and pure functions."""

from sapo_jax.model import hf, hf_config
from sapo_jax.model.config import PRESETS, ModelConfig, make
from sapo_jax.model.transformer import logits

__all__ = ["PRESETS", "ModelConfig", "hf", "hf_config", "logits", "make"]
