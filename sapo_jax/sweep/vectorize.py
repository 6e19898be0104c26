"""An explicit leading axis R over functions of one run, and the ways to compute it.

- ``map``: `jax.lax.map`, one run after the other; each is bitwise the run alone.
- ``vmap``: `jax.vmap`, all at once.
- ``devices``: the runs are split over the devices of this process, the mesh axis `run`. Each has
  runs of its own, by the method of its backend; nothing crosses devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding, SingleDeviceSharding

from sapo_jax.parallel import sharding

# Of one device. On a CPU one run keeps the cores busy; experiments/population has the measurement.
# Accelerators are not measured: small policies leave them idle, which a batched program can only
# better.
METHOD = {"cpu": "map", "gpu": "vmap", "tpu": "vmap"}
BY_RUN = PartitionSpec("run")


def choose(asked: str, runs: int) -> str:
    """The method for R runs; "auto" splits them over accelerators where there are several.

    Raises:
      ValueError: "devices", and no number of devices above one divides R.
    """
    backend, count = jax.default_backend(), sharding.run_mesh(runs).size
    if asked == "auto":
        return "devices" if count > 1 and backend != "cpu" else METHOD.get(backend, "map")
    if asked == "devices" and count == 1:
        local, why = jax.local_device_count(), "this process has one device"
        if local > 1:
            why = f"{runs} runs do not divide by any number, from 2 on, of the {local} devices"
        raise ValueError(f"config.population.method='devices': {why}; must be map or vmap")
    return asked


def place(method: str, runs: int) -> Sharding:
    """Where arrays with an axis R lie."""
    if method == "devices":
        return sharding.named(sharding.run_mesh(runs), BY_RUN)
    return SingleDeviceSharding(jax.devices()[0])


def spread(method: str, live_R: jax.Array, function: Callable, *stacked: Any) -> Any:
    """``function(method, live_R, *stacked)``, of all runs, or on each device of its own runs."""
    if method != "devices":
        return function(method, live_R, *stacked)
    inner = METHOD.get(jax.default_backend(), "map")
    mesh = sharding.run_mesh(len(live_R))
    return sharding.shard_map(partial(function, inner), mesh, BY_RUN, BY_RUN)(live_R, *stacked)


def over(method: str, live_R: jax.Array, function: Callable, *stacked: Any) -> Any:
    """A function of one run, for each run: its arguments and results have a leading axis R.

    Under "map", runs that are not live cost nothing, and their results are zeros; under "vmap" all
    runs are computed.

    The branch is what makes a run of a map bitwise the run alone: XLA fuses the body of a loop with
    the slices that feed it and the writes that follow, other fusions round otherwise, and nothing
    is fused across a branch. (`jax.lax.optimization_barrier` does not achieve that on a CPU.)
    """

    def nothing(*arguments):
        shapes = jax.eval_shape(function, *arguments)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def one(arguments):
        live, *rest = arguments
        return jax.lax.cond(live, function, nothing, *rest)

    def local(method, live_R, *stacked):
        if method == "vmap":
            return jax.vmap(function)(*stacked)
        return jax.lax.map(one, (live_R, *stacked))

    return spread(method, live_R, local, *stacked)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of R runs as one with a leading axis R; NumPy's stay on the host."""

    def join(*leaves):
        on_device = all(isinstance(leaf, jax.Array) for leaf in leaves)
        return (jnp if on_device else np).stack(leaves)

    return jax.tree.map(join, *trees)


def pick(tree: Any, run: int) -> Any:
    """One run of a tree with a leading axis R."""
    return jax.tree.map(lambda x: x[run, ...], tree)


def values(trees: Sequence[Any]) -> Any:
    """Numbers of R runs as arrays [R]: f32, or i32 where all are integers."""

    def array(*numbers):
        whole = all(isinstance(number, int) for number in numbers)
        return np.array(numbers, np.int32 if whole else np.float32)

    return jax.tree.map(array, *trees)
