"""The shape of a policy: a hashable, static description in Hugging Face's terms."""

from __future__ import annotations

import dataclasses
import difflib

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen3-architecture decoder; the names are those of Hugging Face's config.json.

    Attributes:
      stop_tokens: any of these ends a completion, and is part of it.
      pad_token: fills rows after their end; never attended to.
      param_dtype, compute_dtype, cache_dtype: storage of the parameters, of activations and
        matmul inputs, of the sampler's keys and values.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = True
    stop_tokens: tuple[int, ...] = (1,)
    pad_token: int = 0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    cache_dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "pad_token" and value < 1:
                raise ValueError(f"model.{field.name}={value}: must be at least 1")
            if field.name.endswith("_dtype") and value not in DTYPES:
                raise ValueError(
                    f"model.{field.name}={value!r}: must be one of {', '.join(DTYPES)}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: must be even (rotary embedding)")
        for token in (*self.stop_tokens, self.pad_token):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token}: must be in [0, vocab_size={self.vocab_size})")
        if not self.stop_tokens:
            raise ValueError("model.stop_tokens=(): must name at least one token")


def _qwen3(hidden, intermediate, layers, heads, kv_heads, head_dim, *, tied=True) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }


PRESETS: dict[str, dict] = {
    # Rows of tens of tokens: with θ = 1e6 most rotary frequencies would hardly turn.
    "nano": _qwen3(64, 192, 2, 4, 2, 16) | {"rope_theta": 100.0},
    "tiny": _qwen3(128, 384, 6, 4, 2, 32) | {"rope_theta": 100.0},
    "small": _qwen3(256, 768, 8, 8, 4, 32) | {"rope_theta": 100.0},
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, 8, 128) | {"vocab_size": 151936},
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, 8, 128) | {"vocab_size": 151936},
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, 8, 128) | {"vocab_size": 151936},
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, 8, 128, tied=False) | {"vocab_size": 151936},
}


def make(preset: str, **overrides) -> ModelConfig:
    """A preset's shape with fields overridden; the tiny ones need a ``vocab_size``.

    Raises:
      ValueError: an unknown preset, or a field out of its domain.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1, 0)[0]
        raise ValueError(
            f"model.preset={preset!r}: must be one of {', '.join(PRESETS)}; the nearest is {near!r}"
        )
    return ModelConfig(**{**PRESETS[preset], **overrides})
