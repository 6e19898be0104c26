"""What every contestant computes on: a shape, its seeded weights, prompts and completions.

NumPy alone, so that each peer imports it in an environment of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY = 1e-5, 0.9, 0.999, 1e-8, 0.01
CLIP, TAU_POS, TAU_NEG = 0.2, 1.0, 1.05
PAD = 0
ROPE_THETA, NORM_EPS = 1e6, 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen3 policy with tied embeddings, and a batch of its rollouts."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 768
    prompts: int = 8
    group: int = 8
    prompt: int = 32
    completion: int = 96
    stop: float = 0.0  # share of the vocabulary that ends a completion

    @property
    def rows(self) -> int:
        """Completions of a batch."""
        return self.prompts * self.group

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.completion

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion; without ``stop`` one, which is drawn as often as others."""
        return tuple(range(3, 3 + int(self.stop * self.vocab))) or (2,)

    def matmul_parameters(self) -> int:
        """Weights that take part in a matrix product once per token; the tied head counts once."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.vocab * self.hidden

    def update_flops(self) -> float:
        """Of an update without pads: 6 a weight and token, and causal attention's half square."""
        attention = 2 * self.layers * self.heads * self.head_dim * self.width
        return 3.0 * self.rows * self.width * (2 * self.matmul_parameters() + attention)


SHAPES = {
    "small": Shape(),
    "wide": Shape(vocab=16384, hidden=512, layers=2, heads=8, kv_heads=8, head_dim=64, mlp=1536,
                  prompts=4, group=8, prompt=64, completion=64),
    "long": Shape(prompts=2, group=4, prompt=128, completion=640),
    "ragged": Shape(stop=0.03),
    "many": Shape(stop=0.03, prompts=32, group=16),
}  # fmt: skip


def weights(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal weights of deviation 0.02 by the names of a Qwen3 checkpoint, [out, in]; norms 1."""
    rng = np.random.default_rng(seed)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    d, f = shape.hidden, shape.mlp
    sizes = {"model.embed_tokens": (shape.vocab, d), "model.norm": (d,)}
    for i in range(shape.layers):
        sizes |= {
            f"model.layers.{i}.{name}": size
            for name, size in {
                "input_layernorm": (d,), "post_attention_layernorm": (d,),
                "self_attn.q_norm": (shape.head_dim,), "self_attn.k_norm": (shape.head_dim,),
                "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
                "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            }.items()
        }  # fmt: skip
    return {
        name + ".weight": np.float32(np.ones(size) if len(size) == 1 else rng.normal(0, 0.02, size))
        for name, size in sizes.items()
    }


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """A batch to update on: rows of prompt and completion, left-aligned apart."""

    prompt: np.ndarray  # i32[rows, prompt]
    completion: np.ndarray  # i32[rows, completion]
    length: np.ndarray  # i32[rows], tokens of the completion
    advantages: np.ndarray  # f32[rows]
    old_logp: np.ndarray  # f32[rows, completion]

    @property
    def mask(self) -> np.ndarray:
        """The completion tokens that exist, bool[rows, completion]."""
        return np.arange(self.completion.shape[1]) < self.length[:, None]


def rollouts(shape: Shape, seed: int = 1) -> Rollouts:
    """Random tokens; lengths are geometric where the shape has stop tokens, else as long as goes.

    π_old is near a new policy's uniform one, so that ratios are neither all 1 nor all clipped.
    """
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, shape.vocab, (shape.prompts, shape.prompt))
    sizes = (shape.rows, shape.completion)
    length = np.full(shape.rows, shape.completion)
    if shape.stop:
        length = np.minimum(rng.geometric(shape.stop, shape.rows), shape.completion)
    reward = rng.normal(size=(shape.prompts, shape.group))
    advantages = (reward - reward.mean(1, keepdims=True)) / reward.std(1, keepdims=True)
    return Rollouts(
        prompt=np.repeat(prompt, shape.group, 0).astype(np.int32),
        completion=rng.integers(3, shape.vocab, sizes).astype(np.int32),
        length=length.astype(np.int32),
        advantages=advantages.ravel().astype(np.float32),
        old_logp=(-np.log(shape.vocab) + 0.3 * rng.normal(size=sizes)).astype(np.float32),
    )
