"""Meshes, and the one table from logical axes to mesh axes.

Rows (of a batch, slots of a rollout) are split over `ROWS`; a row is never split. Programs run
under `shard_map`: each device sees its part of the arrays, and what crosses devices is written out
(see `collectives`).

The runs of a population lie side by side along `run`, each on its own part of the mesh. The
learner's programs are those of one run under `runs.vmapped`; in a rollout the slots of all runs are
one array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sapo_jax.cli import several

# In this order the rows of a process are adjacent, and `tensor`, which talks most, is innermost.
AXES = ("run", "data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
SLOTS = ("run", *ROWS)
TRAINING, SAMPLER = 0, 1  # columns of the table

TABLE = {
    "rows": (ROWS, ROWS),
    "slots": (SLOTS, SLOTS),  # of the rows of all runs
    "embed": (("fsdp",), ()),
    "experts": (("expert",), ("expert",)),
    "vocab": (("tensor",), ("tensor",)),
    "heads": (("tensor",), ("tensor",)),
    "kv_heads": (("tensor",), ("tensor",)),
    "mlp": (("tensor",), ("tensor",)),
    "expert_mlp": (("tensor",), ("tensor",)),
}  # logical axis: mesh axes in training and in the sampler; others are whole on every device


class Dimension(NamedTuple):
    """Something that the devices of a mesh are to divide."""

    name: str  # of the parameter or the config's field
    axis: str  # a logical axis
    size: int


def spec(*axes: str | None, column: int = TRAINING) -> PartitionSpec:
    """Where an array with these logical axes lies."""
    parts = [TABLE[axis][column] if axis in TABLE else () for axis in axes]
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def named(mesh: Mesh, partition: PartitionSpec) -> NamedSharding:
    """A sharding on a mesh, without the axes that the mesh lacks or that split nothing.

    Compiled programs spell their results' shardings in this way; another spelling of the same
    would make them compile again.
    """
    parts = []
    for part in partition:
        axes = (part,) if isinstance(part, str) else part or ()
        axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(mesh, PartitionSpec(*parts))


def describe(sizes: Mapping[str, int]) -> str:
    """The axes of a mesh in words; `run` where there are several."""
    shown = {axis: size for axis, size in sizes.items() if axis != "run" or size != 1}
    return ", ".join(f"{axis}={size}" for axis, size in shown.items())


def _shapes(devices: int, runs: int) -> Iterator[dict[str, int]]:
    """The meshes of so many devices, for that many runs if they divide the devices."""
    runs = runs if 0 < runs <= devices and devices % runs == 0 else 1
    own = devices // runs
    divisors = [n for n in range(1, own + 1) if own % n == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES) - 1):
        if math.prod(sizes) == own:
            yield dict(zip(AXES, (runs, *sizes), strict=True))


def _remainders(
    sizes: Mapping[str, int], dimensions: Iterable[Dimension], column: int
) -> Iterator[Dimension]:
    for dimension in dimensions:
        if dimension.size % math.prod(sizes.get(a, 1) for a in TABLE[dimension.axis][column]):
            yield dimension


def nearest(
    sizes: Mapping[str, int],
    devices: int,
    dimensions: Iterable[Dimension] = (),
    column: int = TRAINING,
) -> dict[str, int] | None:
    """The mesh of so many devices that divides the dimensions and differs least; None if none does.

    The distance is Σ |log(size / wanted size)|, over the axes with a wanted size (not −1).
    """
    dimensions = list(dimensions)

    def distance(shape):
        wanted = {axis: size for axis, size in sizes.items() if axis in AXES and size > 0}
        apart = sum(abs(math.log(shape[axis] / size)) for axis, size in wanted.items())
        return round(apart, 6), -shape["data"], -shape["fsdp"]  # of equals, the simplest

    shapes = _shapes(devices, sizes.get("run", 1))
    fitting = [s for s in shapes if not any(_remainders(s, dimensions, column))]
    return min(fitting, key=distance, default=None)


def _suggestion(sizes, devices, dimensions=(), column=TRAINING):
    best = nearest(sizes, devices, dimensions, column)
    found = f"the nearest that works is {describe(best)}" if best else "none works"
    return f"of the meshes of {several(devices, 'device')}, {found}"


def check(mesh: Mesh, dimensions: Iterable[Dimension], column: int = TRAINING) -> None:
    """Refuse a mesh that does not divide the dimensions, as a column of the table splits them.

    Raises:
      ValueError: naming the parameter or field, axis, sizes, and the nearest mesh that works.
    """
    dimensions, sizes = list(dimensions), dict(mesh.shape)
    for name, axis, size in _remainders(sizes, dimensions, column):
        over = [a for a in TABLE[axis][column] if sizes.get(a, 1) > 1]
        by = " × ".join(repr(a) for a in over)
        count = " × ".join(str(sizes[a]) for a in over)
        raise ValueError(
            f"{name}: axis {axis!r} of size {size} does not divide by the mesh axis {by} of size "
            f"{count}; {_suggestion(sizes, mesh.size, dimensions, column)}"
        )


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    run: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`, of live devices or of those of a topology description.

    Args:
      data: rows are split, parameters are copied.
      fsdp: rows are split, and parameters, gathered layer by layer, too.
      tensor: heads, feed-forward width and vocabulary are split.
      expert: rows are split, and the experts of sparse layers.
      run: runs side by side, each on devices of its own.
      devices: all of them by default; every one is used.

    One size may be −1: what the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = {"run": run, "data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    shape = _whole_shape(given, len(devices))
    return _mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))


def reshape(mesh: Mesh, data: int = 1, tensor: int = 1, expert: int = 1) -> Mesh:
    """The devices of a mesh as another one, for the sampler, which has no use for `fsdp`.

    Runs keep theirs. In the same order, so that a program can have arrays of both.

    Raises:
      ValueError: as `make_mesh`.
    """
    own = {"data": data, "fsdp": 1, "expert": expert, "tensor": tensor}
    given = {"run": mesh.shape["run"]} | own
    return _mesh(mesh.devices.reshape(_whole_shape(given, mesh.size)))


def _whole_shape(given: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Sizes in the order of the axes; what the others leave for one that is −1."""
    for axis, size in given.items():
        if size < 1 and size != -1:
            raise ValueError(f"{axis}={size}: must be at least 1, or -1 for the rest")
    rest = [axis for axis, size in given.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{describe(given)}: only one axis can take the rest (-1)")
    known = math.prod(size for size in given.values() if size > 0)
    sizes = given | dict.fromkeys(rest, devices // known)
    if known > devices or math.prod(sizes.values()) != devices:
        raise ValueError(
            f"{describe(given)} does not match the number of devices, {devices}; "
            f"{_suggestion(given, devices)}"
        )
    return tuple(sizes[axis] for axis in AXES)


def _mesh(grid: np.ndarray) -> Mesh:
    # Stated, because `jax.make_mesh` and `topologies.make_mesh` differ in their default.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def run_mesh(runs: int) -> Mesh:
    """A mesh with the axis `run` only, of as many devices of this process as divide the runs."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if runs % n == 0)
    return Mesh(np.array(devices[:count]), ("run",), axis_types=(AxisType.Auto,))


def parts(mesh: Mesh | None, axis: str = "rows") -> int:
    """Into how many parts the rows of a run are split, or the slots of all runs."""
    return 1 if mesh is None else math.prod(mesh.shape.get(a, 1) for a in TABLE[axis][0])


def runs(mesh: Mesh | None) -> int:
    """How many runs lie side by side on a mesh; arrays of each have a leading axis if several."""
    return 1 if mesh is None else mesh.shape.get("run", 1)


def by_run(specs: Any, mesh: Mesh | None) -> Any:
    """Specs of one run as those of the runs of a mesh."""
    if runs(mesh) == 1:
        return specs
    return jax.tree.map(lambda s: PartitionSpec("run", *s), specs)


def platform(mesh: Mesh | None) -> str:
    """What programs of a mesh are compiled for; without one, of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which arrays lie; None if that is one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of partition specs as shardings on a mesh."""
    return jax.tree.map(lambda s: named(mesh, s), specs)


def constrain(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    """Within a jitted program: let arrays lie as the tree of specs, or one for all, says."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, specs))


def shard_map(function: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """The function for each device's part of its arguments; as it is where there is no mesh.

    Under `runs.vmapped` each device has its run's part, without the axis R: the function that a run
    alone has. A batched one would choose between old and new at each turn of a loop.
    """
    if mesh is None:
        return function
    options = {"mesh": mesh, "check_vma": False}
    one = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **options)
    if len(mesh.axis_names) == 1 or runs(mesh) == 1:
        return one

    def of_runs(count, batched, *trees):
        assert count == runs(mesh)
        batched, leaf = tuple(batched), lambda s: isinstance(s, PartitionSpec)
        each = jax.tree.broadcast(in_specs, trees, is_leaf=leaf)
        specs = jax.tree.map(lambda s, b: by_run(s, mesh) if b else s, each, batched, is_leaf=leaf)

        def local(*trees):
            own = jax.tree.map(lambda x, b: x[0] if b else x, trees, batched)
            return jax.tree.map(lambda x: x[None], function(*own))

        out = by_run(out_specs, mesh)
        found = jax.shard_map(local, in_specs=specs, out_specs=out, **options)(*trees)
        return found, jax.tree.map(lambda _: True, found)

    # By position: `custom_vmap` would add the defaults of the function's signature.
    mapped = jax.custom_batching.custom_vmap(lambda *trees: one(*trees))
    mapped.def_vmap(of_runs)
    return mapped


def place(tree: Any, mesh: Mesh | None, partition: PartitionSpec | None = None) -> Any:
    """Place arrays of the host on a mesh, split by rows or by another spec; no mesh: as they are.

    Every process has whole arrays and places the parts of its own devices only.
    """
    if mesh is None:
        return tree
    sharding = named(mesh, spec("rows") if partition is None else partition)

    def placed(x):
        if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(placed, tree)


@partial(jax.jit, static_argnames="mesh")
def _whole(tree: Any, mesh: Mesh) -> Any:
    return constrain(tree, mesh, PartitionSpec())


def to_host(tree: Any) -> Any:
    """Whole arrays on the host, of every process: for what is small, such as a number a row."""
    mesh = None if jax.process_count() == 1 else mesh_of(tree)
    return jax.device_get(tree if mesh is None else _whole(tree, mesh))


def own_parts(tree: Any, mesh: Mesh | None) -> dict[int, Any]:
    """The parts of arrays split by slots that this process is to read, by their places.

    Together the processes have each part once; parts that lie on devices of several are the first
    one's. No mesh: the whole is part 0.
    """
    if mesh is None:
        return {0: jax.device_get(tree)}
    count, index = parts(mesh, "slots"), jax.process_index()
    owners = [min(d.process_index for d in part) for part in mesh.devices.reshape(count, -1)]
    mine = [n for n, owner in enumerate(owners) if owner == index]

    def read(x):
        rows = x.shape[0] // count
        at = {(shard.index[0].start or 0) // rows: shard.data for shard in x.addressable_shards}
        return [at[n] for n in mine]

    columns = jax.device_get(jax.tree.map(read, tree))
    leaves, treedef = jax.tree.flatten(columns, is_leaf=lambda x: isinstance(x, list))
    return {n: treedef.unflatten([leaf[i] for leaf in leaves]) for i, n in enumerate(mine)}
