"""The shape of a policy: a hashable, static description in Hugging Face's terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sapo_jax.cli import nearest
from sapo_jax.model.rope import check_scaling

DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "blocked", "xla", "splash", "triton", "cudnn")
MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen2", "llama", "qwen3_vl", "qwen3_vl_moe")
LARGEST = {"num_hidden_layers": 4096, "num_experts": 2**16}  # each is named; others: 32 bits
MAY_BE_ZERO = (
    "pad_token", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "lora_rank",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The tower of a Qwen3-VL model; the names are those of Hugging Face's config.json.

    Attributes:
      num_position_embeddings: a square, of the table that is resampled to an image's grid.
      deepstack_visual_indexes: blocks whose output is added after text layers 0, 1, …
      patch_size, temporal_patch_size, in_channels: a patch is [channel, frame, row, column].
      spatial_merge_size: m² patches become one token.
      mrope_section: rotary pairs that turn with time, height and width.
      min_pixels, max_pixels: of an image as the tower sees it.
      image_token_id, …: placeholders, and what stands around them.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = ()
    patch_size: int = 16
    temporal_patch_size: int = 2
    in_channels: int = 3
    spatial_merge_size: int = 2
    mrope_section: tuple[int, ...] = (24, 20, 20)
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653

    def __post_init__(self):
        for name in ("deepstack_visual_indexes", "mrope_section"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"model.vision.{field.name}={value!r}: must be at least 1")
        indexes, width = self.deepstack_visual_indexes, self.hidden_size
        times = f"times a multiple of 4 must be hidden_size={width}"
        self.check("num_heads", width % (4 * self.num_heads) == 0, times)
        side = math.isqrt(self.num_position_embeddings)
        square = side**2 == self.num_position_embeddings
        self.check("num_position_embeddings", square, "must be a square")
        rising = [*indexes] == sorted({*indexes}) and all(0 <= i < self.depth for i in indexes)
        depth = f"must rise, in [0, depth={self.depth})"
        self.check("deepstack_visual_indexes", rising, depth)

    def check(self, name: str, met: bool, wanted: str) -> None:
        """Refuse the value of a field that does not meet what is wanted."""
        if not met:
            raise ValueError(f"model.vision.{name}={getattr(self, name)}: {wanted}")

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become a token."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Qwen or Llama family; the names are those of Hugging Face's config.json.

    Attributes:
      model_type: one of MODEL_TYPES. The Qwen3 ones normalise queries and keys; qwen2 has a bias
        on q, k and v; the others have one on q, k, v and o if ``attention_bias``.
      rope_scaling: type and parameters of the rotary scaling, see `rope`; given as a dict, kept
        as sorted pairs.
      num_experts: E; 0 for a dense model. Layer i is sparse if it is not in ``mlp_only_layers`` and
        ``decoder_sparse_step`` divides i + 1.
      num_experts_per_tok, moe_intermediate_size: k, and the width of one expert.
      norm_topk_prob: divide the k probabilities by their sum.
      stop_tokens: any of these ends a completion, and is part of it.
      pad_token: fills rows after their end; never attended to.
      bos_token: begins a text in the files of the model; carried along.
      vision: the tower of a model that sees, qwen3_vl or qwen3_vl_moe; None for the others.
      train_vision: whether updates change the tower.
      lora_rank, lora_targets: of adapters, and the projections that have them, see `lora`; with a
        rank the other parameters are frozen.
      attention: the kernel over whole rows, one of ATTENTION; see `attention.causal`.
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
    model_type: str = "qwen3"
    attention_bias: bool = False
    rope_theta: float = 1e6
    rope_scaling: tuple[tuple[str, float | str | bool], ...] = ()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = (1,)
    pad_token: int = 0
    bos_token: int | None = None
    vision: VisionConfig | None = None
    train_vision: bool = True
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    attention: str = "auto"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    cache_dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            pairs = tuple(sorted(dict(self.rope_scaling).items()))
            object.__setattr__(self, "rope_scaling", pairs)
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        self._check_fields()
        self._check_experts()
        self._check_vision()
        check_scaling(dict(self.rope_scaling))
        for token in (*self.stop_tokens, self.pad_token):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token}: must be in [0, vocab_size={self.vocab_size})")
        if not self.stop_tokens:
            raise ValueError("model.stop_tokens=(): must name at least one token")

    def _check_fields(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least, most = field.name not in MAY_BE_ZERO, LARGEST.get(field.name, 2**31 - 1)
                if not least <= value <= most:
                    bound = f"at least {least:d}" if value < least else f"at most {most}"
                    raise ValueError(f"model.{field.name}={value}: must be {bound}")
            if field.name.endswith("_dtype") and value not in DTYPES:
                raise ValueError(
                    f"model.{field.name}={value!r}: must be one of {', '.join(DTYPES)}"
                )
        for field, allowed in (("model_type", MODEL_TYPES), ("attention", ATTENTION)):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"model.{field}={value!r}: must be one of {', '.join(allowed)}")
        if self.attention == "cudnn" and self.compute_dtype == "float32":
            raise ValueError("model.attention='cudnn': needs dtype.compute='bfloat16' or 'float16'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim}: must be even (rotary embedding)")

    def _check_experts(self) -> None:
        if self.model_type.endswith("_moe") != (self.num_experts > 0):
            raise ValueError(
                f"model.num_experts={self.num_experts}: must be at least 1 for the model_type "
                f"'qwen3_moe' or 'qwen3_vl_moe', 0 for the others, this is {self.model_type!r}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok={self.num_experts_per_tok}: must be in "
                f"[1, num_experts={self.num_experts}]"
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise ValueError(
                f"model.moe_intermediate_size={self.moe_intermediate_size}: must be at least 1"
            )

    def _check_vision(self) -> None:
        if ("_vl" in self.model_type) != (self.vision is not None):
            raise ValueError(
                f"model.vision={self.vision}: must be set for the model_type 'qwen3_vl' or "
                f"'qwen3_vl_moe', None for the others, this is {self.model_type!r}"
            )
        if self.vision is None:
            return
        pairs, layers, size = self.head_dim // 2, self.num_hidden_layers, self.vocab_size
        check, sections = self.vision.check, self.vision.mrope_section
        is_split = (len(sections), sum(sections)) == (3, pairs)
        check("mrope_section", is_split, f"must be 3 with the sum {pairs}")
        taps = len(self.vision.deepstack_visual_indexes)
        check("deepstack_visual_indexes", taps <= layers, f"must be at most {layers}")
        check("image_token_id", self.vision.image_token_id < size, f"must be below {size}")

    @property
    def freezes(self) -> bool:
        """Whether updates leave some parameters as they are, see `lora.frozen`."""
        return self.lora_rank > 0 or (self.vision is not None and not self.train_vision)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.model_type.startswith("qwen3")

    @property
    def biased(self) -> tuple[str, ...]:
        """Which of the attention's projections have a bias."""
        if self.model_type == "qwen2":
            return ("q", "k", "v")
        return ("q", "k", "v", "o") if self.attention_bias else ()

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers whose feed-forward is a mixture of experts."""
        step, dense = self.decoder_sparse_step, self.mlp_only_layers
        layers = range(self.num_hidden_layers) if self.num_experts else ()
        return tuple(i for i in layers if i not in dense and (i + 1) % step == 0)


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


def _moe(experts: int, per_token: int, width: int) -> dict:
    return {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
    }


TOWER = VisionConfig(27, 1152, 4304, 16, deepstack_visual_indexes=(8, 16, 24))
TINY_TOWER = VisionConfig(
    2, 64, 192, 2, 64, (0,), patch_size=4, mrope_section=(6, 5, 5),
    min_pixels=64, max_pixels=4096, image_token_id=1,  # the tokenizer's stands in its place
)  # fmt: skip


_30B_A3B = _qwen3(2048, 6144, 48, 32, 4, 128, tied=False) | _moe(128, 8, 768)
PRESETS: dict[str, dict] = {
    # Rows of tens of tokens: with θ = 1e6 most rotary frequencies would hardly turn.
    "nano": _qwen3(64, 192, 2, 4, 2, 16) | {"rope_theta": 100.0},
    "nano_moe": _qwen3(64, 192, 2, 4, 2, 16) | _moe(8, 2, 48) | {"rope_theta": 100.0},
    "tiny": _qwen3(128, 384, 6, 4, 2, 32) | {"rope_theta": 100.0},
    "tiny_moe": _qwen3(128, 384, 6, 4, 2, 32) | _moe(8, 2, 96) | {"rope_theta": 100.0},
    "tiny_vl": _qwen3(128, 384, 4, 4, 2, 32)
    | {"model_type": "qwen3_vl", "rope_theta": 100.0, "vision": TINY_TOWER},
    "small": _qwen3(256, 768, 8, 8, 4, 32) | {"rope_theta": 100.0},
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16, 8, 128) | {"vocab_size": 151936},
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16, 8, 128) | {"vocab_size": 151936},
    "qwen3_4b": _qwen3(2560, 9728, 36, 32, 8, 128) | {"vocab_size": 151936},
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, 8, 128, tied=False) | {"vocab_size": 151936},
    "qwen3_30b_a3b": _30B_A3B | {"vocab_size": 151936},
    "qwen3_vl_30b_a3b": _30B_A3B
    | {"model_type": "qwen3_vl_moe", "rope_theta": 5e6, "max_position_embeddings": 262144}
    | {"vocab_size": 151936, "vision": TOWER},
}


def make(preset: str, **overrides) -> ModelConfig:
    """A preset's shape with fields overridden; the tiny ones need a ``vocab_size``.

    Raises:
      ValueError: an unknown preset, or a field out of its domain.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"model.preset={preset!r}: must be one of {', '.join(PRESETS)}"
            f"{nearest(preset, PRESETS)}"
        )
    return ModelConfig(**{**PRESETS[preset], **overrides})
