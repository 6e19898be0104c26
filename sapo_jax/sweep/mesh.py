"""Runs side by side on a mesh: each on its part, by the programs of a run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sapo_jax import sampler
from sapo_jax.parallel import runs, sharding
from sapo_jax.sampler import weights
from sapo_jax.sweep.population import Population, hyperparameters
from sapo_jax.training.engine import Ends, pick, stack
from sapo_jax.training.settings import Settings
from sapo_jax.types import Batch, Frozen, Prompts, Rollout

ROWS = PartitionSpec("run", sharding.ROWS)


class MeshPopulation(Population):
    """At most as many runs as the mesh's axis `run` has places, on several hosts too.

    A rollout is one of the prompts of all runs, streamed as a run's alone is: the slots of a part
    of the mesh are of its run. Where there are fewer runs than places, those left repeat the first
    run, and nobody looks at them.

    Args:
      runs: settings that differ in traced values, with one mesh.
    """

    def __init__(self, runs: Sequence[Settings]):
        self.runs, self.mesh = tuple(runs), runs[0].mesh
        self.places = sharding.runs(self.mesh)
        self.hp = self._fill(hyperparameters(runs))
        self.sampler_mesh = runs[0].sampler_mesh

    def _fill(self, tree: Any) -> Any:
        """Runs on the host as those of all places."""
        index = [run if run < len(self.runs) else 0 for run in range(self.places)]
        return jax.tree.map(lambda x: np.asarray(x)[index], tree)

    def join(self, trees: Iterable[Any]) -> Any:
        """Trees of the runs with a leading axis, on the host."""
        return self._fill(stack(trees))

    def to_host(self, tree: Any) -> list[Any]:
        """The tree of each run, on the host of every process: of what is small."""
        whole = sharding.to_host(tree)
        return [pick(whole, r) for r in range(len(self.runs))]

    def place(self, trees: Iterable[Any]) -> Any:
        """Trees of the runs that lie on the mesh, one after the other: each is there but once."""

        def first(tree):
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.places, *x.shape)), tree)

        def insert(whole, tree, run):
            there = jnp.arange(self.places) == run
            return jax.tree.map(
                lambda x, y: jnp.where(there.reshape(-1, *(1 for _ in y.shape)), y, x), whole, tree
            )

        trees = iter(trees)
        tree = next(trees)
        where = jax.tree.map(lambda x: x.sharding, self.abstract(tree))
        insert = jax.jit(insert, donate_argnums=0, out_shardings=where)
        whole = jax.jit(first, out_shardings=where)(tree)
        for run, tree in enumerate(trees, 1):
            whole = insert(whole, tree, np.int32(run))
        return whole

    def rows(self, batch: Batch) -> Batch:
        """Rows of the runs, of the host too, split over the learner's mesh."""
        return sharding.place(batch, self.mesh, ROWS)

    def share(self, frozen: Frozen) -> Frozen:
        """On each part, with the axis R, so that the sampler can take it as it is."""
        return self.place([frozen])

    def abstract(self, tree: Any) -> Any:
        """Shapes of the arrays of all places, from those of one, and where they lie."""
        return runs.abstract(tree, self.mesh)

    def each(self, tree: Any) -> Iterator[Any]:
        """The arrays of each run, as one alone has them on this mesh."""
        where = jax.tree.map(
            lambda x: sharding.named(self.mesh, PartitionSpec(*x.sharding.spec[1:])), tree
        )
        one = jax.jit(lambda whole, run: jax.tree.map(lambda x: x[run], whole), out_shardings=where)
        return (one(tree, np.int32(run)) for run in range(len(self.runs)))

    def to_sampler(self, params: Any, frozen: Frozen | None = None) -> sampler.SamplerParams:
        """See `sampler.to_sampler`; with LoRA, each part has the base beside its adapters."""
        config, mesh = self.runs[0].model, self.mesh
        scale = None if frozen is None else self.hp.lora_scale

        def cast(some, column):
            static = {"config": config, "mesh": mesh, "column": column}
            return runs.vmapped(weights.convert_joined, mesh, **static)(some, frozen, scale)

        return weights.carry(cast, params, config, self.sampler_mesh)

    def rollout(
        self,
        weights: Any,
        prompts: Sequence[Prompts],
        on_groups: Sequence[sampler.OnGroups],
        *,
        iteration: int,
        policy_step: int | None = None,
        carry: None = None,
        evaluation: str | None = None,
        warm_up: Callable[[str], None] | None = None,
        on_segment: Callable[[], None] | None = None,
    ) -> tuple[Rollout, list[Ends]]:
        """See `sampler.rollout`: the prompts of a run stand behind those of the run before."""
        del carry
        each = [run.sampling(evaluation) for run in self.runs]
        own = {key: self._fill(np.array([e[key] for e in each])) for key in ("seed", "temperature")}
        plan, count = each[0]["plan"], len(prompts[0].id)
        slots = tuple(self.places * n for n in plan.slots)
        plan = dataclasses.replace(plan, slots=slots, refill=self.places * plan.refill)

        def of_runs(index_g, *columns):
            run_g, own_g = np.divmod(index_g, count)
            for run, report in enumerate(on_groups):
                here_g = run_g == run
                if here_g.any():
                    report(own_g[here_g], *(x[here_g] for x in columns))

        computed = [0]
        rollout = sampler.rollout(
            weights,
            self.runs[0].model,
            jax.tree.map(np.concatenate, self.join(prompts)),
            iteration=iteration,
            policy_step=policy_step,
            on_groups=of_runs,
            on_end=computed.append,
            warm_up=warm_up,
            on_segment=on_segment,
            **each[0] | own | {"plan": plan},
        )
        ended = [np.split(x, self.places) for x in sampler.ends(rollout)]
        ends = [Ends(*each, computed[-1] // self.places) for each in zip(*ended, strict=True)]
        return _split(rollout, self.sampler_mesh), ends[: len(self.runs)]


@partial(jax.jit, static_argnames="mesh")
def _split(rollout: Rollout, mesh: Mesh) -> Rollout:
    """The rows of each run."""
    count = sharding.runs(mesh)
    split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), rollout)
    return sharding.constrain(split, mesh, ROWS)
