"""What crosses devices inside `sharding.shard_map`; nothing at all without a mesh.

An axis that the surrounding mesh lacks, or that has size 1, adds no operation: a program for one
device is the same as if this module did not exist. Gradients are taken inside the shard_map, where
every device differentiates the sum of its own rows, hence two rules for sums over `tensor`
(arXiv 1909.08053, f and g): `copy_to_tensor` where what all devices share meets weights that are
split, `reduce_from_tensor` where the parts of a sum come together.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.parallel.sharding import ROWS
from sapo_jax.types import Effective, Histogram, Max, Min, Weighted, is_reduction


def axis_size(axis: str) -> int:
    """Devices along a mesh axis, 1 outside of a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_index(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def platform() -> str:
    """What the program is compiled for: the mesh's platform, without one the default device's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _present(axes: Iterable[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis_size(axis) > 1)


def psum(tree: Any, axes: Iterable[str]) -> Any:
    """The sum over devices; not to be differentiated."""
    axes = _present(axes)
    return jax.lax.psum(tree, axes) if axes else tree


def pmax(tree: Any, axes: Iterable[str]) -> Any:
    """The maximum over devices; not to be differentiated."""
    axes = _present(axes)
    return jax.lax.pmax(tree, axes) if axes else tree


def pmin(tree: Any, axes: Iterable[str]) -> Any:
    """The minimum over devices; not to be differentiated."""
    axes = _present(axes)
    return jax.lax.pmin(tree, axes) if axes else tree


def all_gather(x: jax.Array, axes: Iterable[str], dimension: int = 0) -> jax.Array:
    """The parts of all devices, one after the other; its gradient is `reduce_scatter`."""
    axes = _present(axes)
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce_scatter(x: jax.Array, axes: Iterable[str], dimension: int = 0) -> jax.Array:
    """This device's part of the sum over devices; its gradient is `all_gather`."""
    axes = _present(axes)
    if not axes:
        return x
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)


@jax.custom_vjp
def _copy(x):
    return x


_copy.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, "tensor"),))


@jax.custom_vjp
def _reduce(x):
    return jax.lax.psum(x, "tensor")


_reduce.defvjp(lambda x: (jax.lax.psum(x, "tensor"), None), lambda _, g: (g,))


def copy_to_tensor(x: jax.Array) -> jax.Array:
    """A value that all devices of `tensor` share, before its use with split weights."""
    return _copy(x) if axis_size("tensor") > 1 else x


def reduce_from_tensor(x: jax.Array) -> jax.Array:
    """The sum of what the devices of `tensor` made of split weights, shared by all of them."""
    return _reduce(x) if axis_size("tensor") > 1 else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather_param(x, dimension, dtype):
    return jax.lax.all_gather(x.astype(dtype), "fsdp", axis=dimension, tiled=True)


def _all_gather_param_forward(x, dimension, dtype):
    return _all_gather_param(x, dimension, dtype), jnp.zeros((), x.dtype)


def _all_gather_param_backward(dimension, dtype, like, g):
    del dtype
    # Summed in the parameter's dtype: bf16 loses what many devices add.
    g = g.astype(like.dtype)
    return (jax.lax.psum_scatter(g, "fsdp", scatter_dimension=dimension, tiled=True),)


_all_gather_param.defvjp(_all_gather_param_forward, _all_gather_param_backward)


def all_gather_param(x: jax.Array, dimension: int, dtype: Any) -> jax.Array:
    """A parameter from its parts along `fsdp`, cast before it travels."""
    if axis_size("fsdp") == 1:
        return x
    return _all_gather_param(x, dimension, jnp.dtype(dtype).name)


def merge(terms: Any) -> Any:
    """Mergeable reductions of the rows of all devices, one all-reduce for each kind."""
    leaves, treedef = jax.tree.flatten(terms, is_leaf=is_reduction)
    kinds = {Weighted: psum, Effective: psum, Histogram: psum, Max: pmax, Min: pmin}
    for kind, reduce in kinds.items():
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kind)]
        values = [leaves[i].counts if kind is Histogram else leaves[i] for i in at]
        for i, value in zip(at, reduce(values, ROWS), strict=True):
            leaves[i] = leaves[i].replace(counts=value) if kind is Histogram else value
    return treedef.unflatten(leaves)
