"""One table of parameters: shape, logical axes, initialiser and Hugging Face name of each.

From it come initial values, abstract values for ahead-of-time compilation, shardings, and the
conversion of checkpoints. Parameters are a plain pytree:
``{"embed", "final_norm", ["head"], "layers": {name: [L', ...]}, ["vision"]}``, each name stacked
over the L' layers that have it (all of them in a dense model) for the learner's scan; "vision" is
described in `vision_table`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model import lora
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.spec import Spec, stacked
from sapo_jax.model.vision_table import vision_table
from sapo_jax.parallel import collectives, sharding


def _attention_table(config: ModelConfig, residual: float) -> dict[str, Spec]:
    d, hd = config.hidden_size, config.head_dim
    h, k = config.num_attention_heads, config.num_key_value_heads
    attn = "model.layers.{}.self_attn."
    outputs = {"q": ("heads", h), "k": ("kv_heads", k), "v": ("kv_heads", k)}
    table = {"attn_norm": Spec((d,), ("embed",), "model.layers.{}.input_layernorm.weight")}
    for name, (axis, heads) in outputs.items():
        axes, hf_name = ("embed", axis, "head_dim"), f"{attn}{name}_proj."
        table[name] = Spec((d, heads, hd), axes, hf_name + "weight", d)
        if name in config.biased:
            table[name + "_bias"] = Spec((heads, hd), axes[1:], hf_name + "bias", scale=0.0)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            table[name] = Spec((hd,), ("head_dim",), f"{attn}{name}.weight")
    out_axes = ("heads", "head_dim", "embed")
    table["o"] = Spec((h, hd, d), out_axes, attn + "o_proj.weight", h * hd, residual)
    if "o" in config.biased:
        table["o_bias"] = Spec((d,), ("embed",), attn + "o_proj.bias", scale=0.0)
    return table


def _mlp_table(config: ModelConfig, residual: float) -> dict[str, Spec]:
    d, f = config.hidden_size, config.intermediate_size
    mlp, axes = "model.layers.{}.mlp.", ("embed", "mlp")
    return {
        "gate": Spec((d, f), axes, mlp + "gate_proj.weight", d),
        "up": Spec((d, f), axes, mlp + "up_proj.weight", d),
        "down": Spec((f, d), axes[::-1], mlp + "down_proj.weight", f, residual),
    }


def _experts_table(config: ModelConfig, residual: float) -> dict[str, Spec]:
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
    mlp, axes = "model.layers.{}.mlp.", ("experts", "embed", "expert_mlp")
    out_axes = ("experts", "expert_mlp", "embed")
    return {
        "router": Spec((d, e), ("embed", "router"), mlp + "gate.weight", d),
        "experts_gate": Spec((e, d, f), axes, mlp + "experts.{}.gate_proj.weight", d),
        "experts_up": Spec((e, d, f), axes, mlp + "experts.{}.up_proj.weight", d),
        "experts_down": Spec((e, f, d), out_axes, mlp + "experts.{}.down_proj.weight", f, residual),
    }


def layer_table(config: ModelConfig) -> dict[str, Spec]:
    """The parameters of layers, dense and sparse, each with the layers that have it."""
    # Residual branches start smaller, so that the stream's variance does not grow with depth.
    residual = 1 / math.sqrt(2 * config.num_hidden_layers)
    norm = Spec(
        (config.hidden_size,), ("embed",), "model.layers.{}.post_attention_layernorm.weight"
    )
    every = tuple(range(config.num_hidden_layers))
    sparse = config.sparse_layers
    dense = tuple(i for i in every if i not in sparse)
    parts = ((every, _attention_table(config, residual) | {"mlp_norm": norm}),)
    parts += ((dense, _mlp_table(config, residual)),) if dense else ()
    parts += ((sparse, _experts_table(config, residual)),) if sparse else ()
    found = {
        name: dataclasses.replace(_renamed(spec, config), layers=layers)
        for layers, table in parts
        for name, spec in table.items()
    }
    return found | lora.adapters(found, config)


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
    top = {name: _renamed(spec, config) for name, spec in top.items()}
    top["layers"] = stacked(layer_table(config))
    if config.vision:
        own = vision_table(config)
        top["vision"] = own | {n: stacked(own[n]) for n in ("blocks", "deepstack") if n in own}
    return top


def _renamed(spec: Spec, config: ModelConfig) -> Spec:
    """Under the name that the files of models that see have for it."""
    if config.vision is None:
        return spec
    name = spec.hf_name.replace("model.", "model.language_model.", 1)
    return dataclasses.replace(spec, hf_name=name)


def unstack(layers: dict[str, Any], config: ModelConfig) -> list[dict[str, Any]]:
    """The stacked parameters of layers as one dictionary for each layer."""
    specs = layer_table(config)
    return [
        {
            name: value[specs[name].layers.index(i)]
            for name, value in layers.items()
            if i in specs[name].layers
        }
        for i in range(config.num_hidden_layers)
    ]


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Layers that one scan visits: ``repeats`` times a period of ``period`` layers."""

    start: int
    period: int
    repeats: int

    @property
    def layers(self) -> range:
        """All of its layers."""
        return range(self.start, self.start + self.period * self.repeats)

    def part(self, value: Any, layers: tuple[int, ...]) -> Any:
        """Its part of what is stacked over ``layers``, as [repeats, layers of a period, ...]."""
        inside = [n for n, i in enumerate(layers) if i in self.layers]
        part = value if len(inside) == len(layers) else value[inside[0] : inside[-1] + 1]
        return part.reshape(self.repeats, -1, *value.shape[1:])

    def places(self, specs: dict[str, Spec]) -> list[dict[str, int]]:
        """For each layer of a period: the names that it has, with their place in `part`."""
        return [
            {
                name: sum(self.start <= j < i for j in spec.layers)
                for name, spec in specs.items()
                if i in spec.layers
            }
            for i in self.layers[: self.period]
        ]


def layer_stacks(config: ModelConfig) -> tuple[LayerStack, ...]:
    """The layers as scans: over the shortest period of dense and sparse ones, else over runs."""
    n = config.num_hidden_layers
    sparse = [i in config.sparse_layers for i in range(n)]
    for period in range(1, n // 2 + 1):
        if n % period == 0 and sparse == sparse[:period] * (n // period):
            return (LayerStack(0, period, n // period),)
    starts = [i for i in range(n) if i == 0 or sparse[i] != sparse[i - 1]]
    return tuple(LayerStack(a, 1, b - a) for a, b in zip(starts, [*starts[1:], n], strict=True))


def abstract(config: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype or config.param_dtype)),
        table(config),
    )


def init(config: ModelConfig, seed: int | jax.Array) -> Any:
    """Random parameters: norms 1, biases 0, matrices normal with variance scale²/fan_in.

    With LoRA, of the adapters alone.
    """
    specs, treedef = jax.tree.flatten(lora.trained(table(config), config))
    keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(specs))

    def draw(key, spec):
        dtype = spec.dtype or config.param_dtype
        if not spec.fan_in:
            return jnp.full(spec.shape, spec.scale, dtype)
        std = spec.scale / math.sqrt(spec.fan_in)
        return (std * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)

    return treedef.unflatten([draw(key, spec) for key, spec in zip(keys, specs, strict=True)])


def count(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def head_weight(params: Any) -> jax.Array:
    """The output matrix [V, D]: the embedding's where they are tied."""
    return params.get("head", params["embed"])


def partition_specs(config: ModelConfig, column: int = sharding.TRAINING) -> Any:
    """Where the parameters lie on a mesh, by a column of `sharding.TABLE`."""
    return jax.tree.map(lambda s: sharding.spec(*s.axes, column=column), table(config))


def shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Where the learner's parameters lie on a mesh; axes that the mesh lacks split nothing.

    Raises:
      ValueError: a dimension that does not divide, naming parameter, axis and sizes.
    """
    sharding.check(mesh, dimensions(config))
    return sharding.shardings(mesh, partition_specs(config))


def dimensions(config: ModelConfig) -> list[sharding.Dimension]:
    """What a mesh has to divide."""
    return [
        sharding.Dimension(spec.hf_name, axis, size)
        for spec in jax.tree.leaves(table(config))
        for axis, size in zip(spec.axes, spec.shape, strict=True)
        if axis in sharding.TABLE
    ]


# Norms and routers compute in f32, from parameters in their own dtype.
UNCAST = (
    "attn_norm", "mlp_norm", "final_norm", "router",
    "norm", "norm_bias", "norm1", "norm1_bias", "norm2", "norm2_bias",
)  # fmt: skip


def all_gather(params: dict[str, Any], specs: dict[str, Spec], config: ModelConfig) -> Any:
    """The parameters from their parts along `fsdp`, in the dtype in which they are used."""

    def whole(name, value):
        axes = () if isinstance(value, dict) else specs[name].axes  # layers are gathered one by one
        if "embed" not in axes:
            return value
        dtype = value.dtype if name in UNCAST else config.compute_dtype
        return collectives.all_gather_param(value, axes.index("embed"), dtype)

    return {name: whole(name, value) for name, value in params.items()}


def psum_gradients(grads: Any, config: ModelConfig) -> Any:
    """Gradients of each device's rows, added up: over the axes that do not split the parameter."""
    leaves, treedef = jax.tree.flatten(grads)
    over: dict[tuple, list[int]] = {}
    for i, spec in enumerate(jax.tree.leaves(lora.trained(partition_specs(config), config))):
        own = {a for part in spec if part for a in ((part,) if isinstance(part, str) else part)}
        over.setdefault(tuple(a for a in sharding.ROWS if a not in own), []).append(i)
    for axes, at in over.items():
        for i, value in zip(at, collectives.psum([leaves[i] for i in at], axes), strict=True):
            leaves[i] = value
    return treedef.unflatten(leaves)
