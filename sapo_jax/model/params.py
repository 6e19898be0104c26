"""One table of parameters: shape, logical axes, initialiser and Hugging Face name of each.

From it come initial values, abstract values for ahead-of-time compilation, shardings, and the
conversion of checkpoints. Parameters are a plain pytree:
``{"embed", "final_norm", ["head"], "layers": {name: [L, ...]}}``, the layers stacked for the
learner's scan.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter; those of layers are described without their leading L axis.

    Attributes:
      shape: sizes of the axes.
      axes: logical names of the axes.
      hf_name: name in a Hugging Face checkpoint, ``{}`` for the layer's number. Their linear
        weights are [out, in]; ours are [in..., out...].
      fan_in: 0 for norms (initialised to 1), else the variance is 1/fan_in.
      scale: multiplies the initial standard deviation.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    fan_in: int = 0
    scale: float = 1.0


def layer_table(config: ModelConfig) -> dict[str, Spec]:
    """The parameters of one layer."""
    d, f = config.hidden_size, config.intermediate_size
    h, k, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attn, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    # Residual branches start smaller, so that the stream's variance does not grow with depth.
    residual = 1 / math.sqrt(2 * config.num_hidden_layers)
    qkv_axes = ("embed", "heads", "head_dim")
    kv_axes = ("embed", "kv_heads", "head_dim")
    return {
        "attn_norm": Spec((d,), ("embed",), "model.layers.{}.input_layernorm.weight"),
        "q": Spec((d, h, hd), qkv_axes, attn + "q_proj.weight", d),
        "k": Spec((d, k, hd), kv_axes, attn + "k_proj.weight", d),
        "v": Spec((d, k, hd), kv_axes, attn + "v_proj.weight", d),
        "q_norm": Spec((hd,), ("head_dim",), attn + "q_norm.weight"),
        "k_norm": Spec((hd,), ("head_dim",), attn + "k_norm.weight"),
        "o": Spec(
            (h, hd, d), ("heads", "head_dim", "embed"), attn + "o_proj.weight", h * hd, residual
        ),
        "mlp_norm": Spec((d,), ("embed",), "model.layers.{}.post_attention_layernorm.weight"),
        "gate": Spec((d, f), ("embed", "mlp"), mlp + "gate_proj.weight", d),
        "up": Spec((d, f), ("embed", "mlp"), mlp + "up_proj.weight", d),
        "down": Spec((f, d), ("mlp", "embed"), mlp + "down_proj.weight", f, residual),
    }


def table(config: ModelConfig) -> dict[str, Any]:
    """The whole table, a tree of Specs with the structure of the parameters."""
    v, d = config.vocab_size, config.hidden_size
    vocab_axes = ("vocab", "embed")
    top = {
        "embed": Spec((v, d), vocab_axes, "model.embed_tokens.weight", d),
        "final_norm": Spec((d,), ("embed",), "model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        top["head"] = Spec((v, d), vocab_axes, "lm_head.weight", d)
    stacked = {
        name: dataclasses.replace(
            spec, shape=(config.num_hidden_layers, *spec.shape), axes=("layers", *spec.axes)
        )
        for name, spec in layer_table(config).items()
    }
    return {**top, "layers": stacked}


def _map(function, tree):
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, Spec))


def abstract(config: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters."""
    return _map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(config.param_dtype)), table(config)
    )


def init(config: ModelConfig, seed: int | jax.Array) -> Any:
    """Random parameters: norms 1, matrices normal with variance scale²/fan_in."""
    specs, treedef = jax.tree.flatten(table(config), is_leaf=lambda x: isinstance(x, Spec))
    keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(specs))

    def draw(key, spec):
        if not spec.fan_in:
            return jnp.ones(spec.shape, config.param_dtype)
        std = spec.scale / math.sqrt(spec.fan_in)
        return (std * jax.random.normal(key, spec.shape, jnp.float32)).astype(config.param_dtype)

    return treedef.unflatten([draw(key, spec) for key, spec in zip(keys, specs, strict=True)])


def count(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def head_weight(params: Any) -> jax.Array:
    """The output matrix [V, D]: the embedding's where they are tied."""
    return params.get("head", params["embed"])
