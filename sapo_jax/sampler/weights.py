"""Parameters from the learner's dtype and layout to those of the sampler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sapo_jax.model import lora, params
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.types import Frozen


@jax.tree_util.register_pytree_with_keys_class
class SamplerParams(dict):
    """Parameters as the sampler reads them, by name; "layers" is a list with a dict for each layer.

    A type of its own, so that whoever takes parameters can tell these from the learner's.
    """

    def tree_flatten_with_keys(self):
        """The parameters by name, in the order of a dictionary's leaves."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, values):
        """The inverse."""
        return cls(zip(names, values, strict=True))


def partition_specs(config: ModelConfig, column: int = sharding.SAMPLER) -> SamplerParams:
    """Where the sampler's parameters lie: no device keeps parts for others (no `fsdp`).

    Or where those of the learner would if they were its, by the other column.
    """
    top = params.partition_specs(config, column)
    layers = [
        {
            name: sharding.spec(*spec.axes, column=column)
            for name, spec in params.layer_table(config).items()
            if i in spec.layers
        }
        for i in range(config.num_hidden_layers)
    ]
    return SamplerParams(top | {"layers": layers})


def join(own: SamplerParams, frozen: Frozen | None) -> SamplerParams:
    """The parameters of a policy from its own and those that it shares with others."""
    if frozen is None:
        return own
    base = frozen.params.get("layers", [{} for _ in own["layers"]])
    layers = [each | more for each, more in zip(base, own["layers"], strict=True)]
    return SamplerParams(frozen.params | own | {"layers": layers})


@partial(jax.jit, static_argnames=("config", "mesh", "column"))
def convert(
    learner_params: dict[str, Any],
    config: ModelConfig,
    mesh: Mesh | None = None,
    column: int = sharding.SAMPLER,
) -> SamplerParams:
    """Some of the parameters in the sampler's dtype, placed as a column of the table says."""

    def cast(path, x):  # a router decides in f32, in the sampler as in the learner
        is_router = getattr(path[-1], "key", None) == "router"
        return x if is_router else x.astype(config.compute_dtype)

    def present(tree):
        return {name: tree[name] for name in learner_params}

    converted = jax.tree.map_with_path(cast, learner_params)
    # Stated before and after the move, so that what travels is cast already.
    converted = sharding.constrain(converted, mesh, present(params.partition_specs(config)))
    if "layers" in converted:
        converted |= {"layers": params.unstack(converted["layers"], config)}
    specs = partition_specs(config, column)
    return SamplerParams(sharding.constrain(converted, mesh, present(specs)))


def convert_joined(
    own: Any,
    frozen: Frozen | None,
    scale: jax.Array | None,
    config: ModelConfig,
    mesh: Mesh | None,
    column: int,
) -> SamplerParams:
    """`convert` of a policy; of adapters, with the base beside them."""
    return convert(lora.join(own, frozen, scale), config, mesh, column)


@functools.cache
def _resharding(treedef: Any, where: tuple[NamedSharding, ...]) -> Callable:
    return jax.jit(lambda tree: tree, out_shardings=jax.tree.unflatten(treedef, where))


def moves(config: ModelConfig, target: Mesh) -> tuple[list[Callable], Callable]:
    """Programs from `convert`'s mesh to another: of each layer, and of the parameters beside them.

    In one for all the compiler would gather all layers before it splits the first. Constraints to a
    second mesh do not bind what leaves a program: parameters would come out whole on each device.
    `jax.device_put` goes by way of the host where a process has all devices.
    """

    def program(specs):
        leaves, treedef = jax.tree.flatten(sharding.shardings(target, specs))
        return _resharding(treedef, tuple(leaves))

    specs = dict(sharding.by_run(partition_specs(config), target))
    return [program(layer) for layer in specs.pop("layers")], program(specs)


def move(converted: SamplerParams, config: ModelConfig, target: Mesh) -> SamplerParams:
    """All parameters from `convert`'s mesh to another one of the same devices."""
    (layers, beside), top = moves(config, target), dict(converted)
    stacks = top.pop("layers")
    moved = [layer(own) for layer, own in zip(layers, stacks, strict=True)]
    return SamplerParams(beside(top) | {"layers": moved})


def unchanged(learner_params: dict[str, Any], config: ModelConfig) -> list[str]:
    """Names of parameters, abstract ones too, that have the sampler's dtype and layout already."""
    dtype, mesh = jnp.dtype(config.compute_dtype), sharding.mesh_of(learner_params)
    specs = partition_specs(config)

    def stays(name, value):
        if isinstance(value, dict) or value.dtype != dtype:
            return False
        own = mesh and sharding.named(mesh, sharding.by_run(specs[name], mesh))
        return mesh is None or value.sharding.is_equivalent_to(own, value.ndim)

    return [name for name, value in learner_params.items() if stays(name, value)]


def carry(
    convert: Callable[[dict[str, Any], int], SamplerParams],
    learner_params: dict[str, Any],
    config: ModelConfig,
    target: Mesh | None,
) -> SamplerParams:
    """The learner's parameters by ``convert``, of some of them to a column of the table, and from
    there to ``target``, where that is another mesh.
    """
    if target not in (None, sharding.mesh_of(learner_params)) and target.size > 1:
        return move(convert(learner_params, sharding.TRAINING), config, target)
    same = {name: jnp.asarray(learner_params[name]) for name in unchanged(learner_params, config)}
    rest = {name: value for name, value in learner_params.items() if name not in same}
    return SamplerParams(convert(rest, sharding.SAMPLER) | same)


def devices_of(params: Any) -> set[Any]:
    """Where the parameters lie; arrays of the host are on the default device."""
    leaf = jax.tree.leaves(params)[0]
    return leaf.sharding.device_set if isinstance(leaf, jax.Array) else {jax.devices()[0]}


def to_sampler(params: Any, config: ModelConfig, mesh: Mesh | None = None) -> SamplerParams:
    """Parameters as the sampler reads them: compute dtype, one leaf per layer, no `fsdp`.

    Decoding from slices of stacked weights would copy them at each step. What has the dtype and
    the layout already comes back as it is, buffers included.

    Args:
      params: the learner's; or the sampler's own, which come back as they are.
      config: the model's shape.
      mesh: the sampler's, of the same devices in the same order (`sharding.reshape`), or of none of
        them; by default the learner's.
    """
    if isinstance(params, SamplerParams):
        return params

    def cast(some, column):
        return convert(some, config, sharding.mesh_of(params), column)

    if mesh is not None and not set(mesh.devices.flat) & devices_of(params):
        where = sharding.shardings(mesh, partition_specs(config))
        return jax.device_put(cast(params, sharding.TRAINING), where)
    return carry(cast, params, config, mesh)


def moved_bytes(before: Any, after: SamplerParams) -> int:
    """Bytes of the sampler's parameters, over all devices, that are not buffers of the learner."""
    shared = {id(leaf) for leaf in jax.tree.leaves(before)}
    fresh = [leaf for leaf in jax.tree.leaves(after) if id(leaf) not in shared]
    return sum(shard.data.nbytes for leaf in fresh for shard in leaf.addressable_shards)
