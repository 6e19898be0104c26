"""What is of one run as of R: programs, and abstract values, with a leading axis R."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.parallel import collectives, sharding
from sapo_jax.types import Frozen

BY_RUN = PartitionSpec("run")


@functools.cache
def vmapped(
    function: Callable, mesh: Mesh | None, donate: tuple[int, ...] = (), /, **static: Any
) -> Callable:
    """A function of one run as one program of all: its trees have a leading axis R.

    On a mesh with other axes beside `run` each run is computed on its part; what is under
    `sharding.shard_map` is there the program of a run alone. Elsewhere what is `Frozen` is there
    once, without the axis.
    """

    def program(*trees):
        if mesh is not None and mesh.axis_names != ("run",):
            return jax.vmap(partial(function, **static), spmd_axis_name="run")(*trees)
        shared = [isinstance(tree, Frozen) for tree in trees]
        each = jax.vmap(partial(function, **static), [None if s else 0 for s in shared])
        specs = tuple(PartitionSpec() if s else BY_RUN for s in shared)
        return sharding.shard_map(each, mesh, specs, BY_RUN)(*trees)

    program.__name__ = function.__name__  # as profiles and logs of compilations show it
    return jax.jit(program, donate_argnums=donate)


def abstract(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of one run, or abstract values, as the abstract ones of the runs of a mesh."""
    count = sharding.runs(mesh)
    if count == 1:
        return tree

    def one(x):
        place = sharding.named(mesh, PartitionSpec("run", *x.sharding.spec))
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=place)

    return jax.tree.map(one, tree)


def of_device(tree: Any) -> Any:
    """Within `sharding.shard_map`: the device's own run of a tree with a leading axis R.

    Where `run` is the mesh's only axis, a device has several runs, and `vmap` has taken the axis.
    """
    alone = jax.sharding.get_abstract_mesh().axis_names == ("run",)
    if alone or collectives.axis_size("run") == 1:
        return tree
    return jax.tree.map(lambda x: x[0], tree)
