"""Parameters from the learner's dtype and layout to those of the sampler."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapo_jax.model import params
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding


def specs(config: ModelConfig) -> Any:
    """Where the sampler's parameters lie: no device keeps parts for others (no `fsdp`)."""
    top = params.partition_specs(config, sharding.SAMPLER)
    layers = [
        {
            name: sharding.spec(*spec.axes, column=sharding.SAMPLER)
            for name, spec in params.layer_table(config).items()
            if i in spec.layers
        }
        for i in range(config.num_hidden_layers)
    ]
    return {**top, "layers": layers}


@partial(jax.jit, static_argnames=("config", "mesh"))
def convert(weights: Any, config: ModelConfig, mesh: Mesh | None = None) -> Any:
    """Some of the parameters, "layers" among them, as the sampler reads them."""

    def cast(path, x):  # a router decides in f32, in the sampler as in the learner
        is_router = getattr(path[-1], "key", None) == "router"
        return x if is_router else x.astype(config.compute_dtype)

    def some(tree):
        return {name: tree[name] for name in weights}

    converted = jax.tree.map_with_path(cast, weights)
    # Stated before and after the move, so that what travels is cast already.
    converted = sharding.constrain(converted, mesh, some(params.partition_specs(config)))
    converted = {**converted, "layers": params.unstack(converted["layers"], config)}
    return sharding.constrain(converted, mesh, some(specs(config)))


def unchanged(weights: Any, config: ModelConfig) -> set[str]:
    """Names of parameters, abstract ones too, that have the sampler's dtype and layout already."""
    dtype, mesh = jnp.dtype(config.compute_dtype), sharding.mesh_of(weights)
    target = specs(config)

    def stays(name, value):
        if name == "layers" or value.dtype != dtype:
            return False
        if mesh is None:
            return True
        return value.sharding.is_equivalent_to(sharding.named(mesh, target[name]), value.ndim)

    return {name for name, value in weights.items() if stays(name, value)}


def to_sampler(weights: Any, config: ModelConfig) -> Any:
    """Parameters as the sampler reads them: compute dtype, one leaf per layer, no `fsdp`.

    Decoding from slices of stacked weights would copy them at each step. What has the dtype and
    the layout already comes back as it is, buffers included.
    """
    if isinstance(weights["layers"], list):
        return weights
    same = {name: jnp.asarray(weights[name]) for name in unchanged(weights, config)}
    rest = {name: value for name, value in weights.items() if name not in same}
    return convert(rest, config, sharding.mesh_of(weights)) | same


def moved_bytes(before: Any, after: Any) -> int:
    """Bytes of the sampler's parameters, over all devices, that are not buffers of the learner."""
    kept = {id(leaf) for leaf in jax.tree.leaves(before)}
    fresh = [leaf for leaf in jax.tree.leaves(after) if id(leaf) not in kept]
    return sum(shard.data.nbytes for leaf in fresh for shard in leaf.addressable_shards)
