"""R runs that differ in traced values, through the same executables: an explicit leading axis R."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding

from sapo_jax import learner, objectives, rewards, sampler
from sapo_jax.learner import Hyperparameters
from sapo_jax.model import lora
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.parallel.runs import BY_RUN, vmapped
from sapo_jax.sampler import SamplerParams, sampling
from sapo_jax.sampler.weights import convert, unchanged
from sapo_jax.sweep import rollouts
from sapo_jax.training.engine import Ends, pick, stack
from sapo_jax.training.settings import Settings
from sapo_jax.types import Batch, Frozen, Prompts, Rollout, TrainState

# Of one device. On a CPU one run keeps the cores busy; experiments/population has the measurement.
# Accelerators are not measured: small policies leave them idle, which a batched program can only
# better.
METHOD = {"cpu": "map", "gpu": "vmap", "tpu": "vmap"}


def choose(method: str, runs: int) -> str:
    """How R runs share the hardware; "auto" splits them over accelerators where there are several.

    - ``map``: one after the other, each with an engine of its own; each is bitwise the run alone.
    - ``vmap``: all at once, one `Population`.
    - ``devices``: a `Population` split over the devices of this process; nothing crosses them.
    - ``mesh``, of runs that have one: a `MeshPopulation`, or a run alone.

    Raises:
      ValueError: "devices", and no number of devices above one divides R.
    """
    backend, count = jax.default_backend(), sharding.run_mesh(runs).size
    if method == "auto":
        return "devices" if count > 1 and backend != "cpu" else METHOD.get(backend, "map")
    if method == "devices" and count == 1:
        local, why = jax.local_device_count(), "this process has one device"
        if local > 1:
            why = f"{runs} runs do not divide by any number, from 2 on, of the {local} devices"
        raise ValueError(f"config.population.method='devices': {why}; must be map or vmap")
    return method


def hyperparameters(runs: Sequence[Settings]) -> Hyperparameters:
    """Those of R runs as arrays [R], f32 or i32; several objectives become choices of one switch.

    An objective of a name and aggregation differs in its values only.
    """
    own = [run.config.objective for run in runs]
    names = [f"{o.name}/{o.aggregation}" if o.aggregation else o.name for o in own]
    names = [name.replace(".", "_") for name in names]  # of a file; a switch has dots of its own
    every, members = [run.hp for run in runs], {}
    for name, hp in zip(names, every, strict=True):
        members.setdefault(name, hp.objective)
    if len(members) > 1:
        both, order = objectives.switch(members), list(members)

        def chosen(name, objective):
            values = {f"{name}.{key}": x for key, x in objective.hyperparameters.items()}
            return objectives.resolve(both, index=order.index(name), **values)

        for r, (name, hp) in enumerate(zip(names, every, strict=True)):
            schedule = hp.objective_schedule
            schedule = schedule.replace(end=chosen(name, schedule.end))
            every[r] = hp.replace(objective=chosen(name, hp.objective), objective_schedule=schedule)
    return stack(every)


def to_sampler(params: Any, config: ModelConfig, mesh: Mesh | None = None) -> SamplerParams:
    """`sampler.to_sampler` of R runs."""
    names = unchanged(jax.eval_shape(partial(pick, run=0), params), config)
    rest = {name: value for name, value in params.items() if name not in names}
    converted = vmapped(convert, mesh, config=config)(rest)
    return SamplerParams(converted | {name: params[name] for name in names})


class Population:
    """R runs at once, by `jax.vmap`; its methods are those of `training.engine.Streamed`.

    Args:
      runs: settings that differ in traced values.
      method: "vmap", or "devices".
    """

    def __init__(self, runs: Sequence[Settings], method: str):
        self.runs, self.hp = tuple(runs), hyperparameters(runs)
        self.mesh = sharding.run_mesh(len(runs)) if method == "devices" else None
        one = SingleDeviceSharding(jax.devices()[0])
        self.where = sharding.named(self.mesh, BY_RUN) if self.mesh else one
        self.everywhere = sharding.named(self.mesh, PartitionSpec()) if self.mesh else one

    def join(self, trees: Iterable[Any]) -> Any:
        """Trees of the runs with a leading axis R, on the host."""
        return stack(trees)

    def to_host(self, tree: Any) -> list[Any]:
        """The tree of each run, on the host."""
        whole = jax.device_get(tree)
        return [pick(whole, r) for r in range(len(self.runs))]

    def place(self, trees: Iterable[Any]) -> Any:
        """By way of the host: a device keeps its own runs only, and none of them twice."""
        return jax.device_put(stack(map(jax.device_get, trees)), self.where)

    def rows(self, batch: Batch) -> Batch:
        """They lie where their runs do."""
        return batch

    def abstract(self, tree: Any) -> Any:
        """Shapes of the runs' arrays, from those of one, and where they lie."""
        count = len(self.runs)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=self.where), tree
        )

    def each(self, tree: Any) -> Iterator[Any]:
        """The arrays of each run, on the host."""
        return iter(self.to_host(tree))

    def share(self, frozen: Frozen) -> Frozen:
        """What all of the runs have in common, once on each device."""
        return jax.device_put(frozen, self.everywhere)

    def call(self, function: Callable, *trees: Any, **static: Any) -> Any:
        """A jitted function of one run, of all."""
        return vmapped(function, self.mesh, **static)(*trees)

    def to_sampler(self, params: Any, frozen: Frozen | None = None) -> Any:
        """See `to_sampler`; with LoRA of the adapters, and then of the base, once for all runs."""
        config = self.runs[0].model
        if frozen is None:
            return to_sampler(params, config, self.mesh), None
        own = to_sampler(self.call(lora.scaled, params, self.hp.lora_scale), config, self.mesh)
        base = sampler.to_sampler(frozen.params, lora.base(config))
        return own, Frozen(base)

    def rollout(
        self,
        weights: Any,
        prompts: Sequence[Prompts],
        on_groups: Sequence[rewards.Groups],
        *,
        iteration: int,
        policy_step: int | None = None,
        evaluation: str | None = None,
        carry: None = None,
        warm_up: Callable[[str], None] | None = None,
        on_segment: Callable[[], None] | None = None,
    ) -> tuple[Rollout, list[Ends]]:
        """All prompts at once, in one segment; groups are reported when all runs are sampled."""
        del on_segment, carry
        each = [run.sampling(evaluation) for run in self.runs]
        first = each[0]
        top = {name: first.get(name) for name in ("top_k", "top_p")}
        plan = first["plan"].of_part(1, first["group_size"])
        seed_R = np.array([own["seed"] for own in each], np.uint32)
        if warm_up:
            warm_up("sampling")
        own, frozen = weights
        found, steps_R = rollouts.rollout(
            np.full(len(self.runs), warm_up is None),
            own,
            self.runs[0].model,
            stack(map(sampling.with_occurrence, prompts)),
            sampling.base_key(seed_R, first["domain"], np.int32(iteration)),
            sampling.controls([own["temperature"] for own in each], **top),
            np.int32(iteration if policy_step is None else policy_step),
            group_size=first["group_size"],
            max_new_tokens=first["max_new_tokens"],
            rows=plan.rows[0],
            cache=plan.cache,
            truncate=any(value is not None for value in top.values()),
            frozen=frozen,
            mesh=self.mesh,
        )
        every = self.to_host(found)
        for groups, rows in zip(on_groups, every, strict=True):
            rollouts.report(groups, rows, first["group_size"])
        computed_R = np.asarray(steps_R) * plan.slots[0] * plan.rows[0]
        pairs = zip(every, computed_R.tolist(), strict=True)
        return found, [Ends(rows.mask.sum(-1), rows.finished, n) for rows, n in pairs]

    def learn(
        self, state: TrainState, minibatches: tuple[Batch, ...], frozen: Frozen | None = None
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """The state after an iteration's updates, and a record for each run."""
        collected = []
        for batch in minibatches:
            update = vmapped(learner.update, self.mesh, (0,))
            state, metrics = update(state, batch, self.hp, frozen)
            collected.append(metrics)
        finished = self.call(learner.finish_iteration, tuple(collected))
        found = self.to_host((state.update, *finished))
        return learner.end_iteration(state), [learner.record(*each) for each in found]
