"""Where runs start and stop: their first state or that of a checkpoint, compiled programs, saves.

A run alone has a checkpoint of its state. The runs of a cohort have one together, with a leading
axis R on every array, and at their end each its own, as a run alone.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from sapo_jax import learner, rewards
from sapo_jax.parallel import distributed
from sapo_jax.training import evaluation, parameters
from sapo_jax.training.checkpoint import Checkpoints, DamagedError
from sapo_jax.training.digest import digests
from sapo_jax.training.engine import Bundle, Streamed, pick, stack
from sapo_jax.training.experience import SOURCES, open_stream
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import read_config, read_metrics
from sapo_jax.types import Frozen, TrainState

NO_ADAPTERS: dict[str, dict] = {"layers": {}}  # the base alone: with LoRA, the reference


def start(
    engines: Sequence[Any], checkpoints: Checkpoints, *, alone: bool = True
) -> tuple[list[Bundle], int]:
    """The engines' runs as they stand, and how many iterations they have done.

    Args:
      engines: of one run, or of all runs of a cohort.
      checkpoints: of these runs; the newest one decides.
      alone: whether they are of one run by itself.

    Raises:
      ValueError: what is needed cannot be restored.
    """
    lead = engines[0].runs[0]
    for one in lead.evals.values() if lead.config.eval.every else ():
        len(one.examples)  # raises where there are too few, before any compile
    check_memory(lead)
    runs = [run for engine in engines for run in engine.runs]
    found = _restore_newest(engines, checkpoints, alone)
    latest, states, metas = found or (0, [], [{} for _ in runs])
    given: dict[str, Any] = {}  # read and placed once for all runs that start from it

    def weights(run, origin):
        key = run.config.init_from
        if key not in given:
            params, now = parameters.first(run, origin)
            given[key] = Streamed(run).place([params]), now
        params, now = given[key]
        parameters.check(run, origin, now)
        return params

    def first(run):
        if run.model.lora_rank or not run.config.init_from:
            return learner.init(parameters.random(run), run.hp)
        begin = weights(run, None)
        return learner.init(jax.tree.map(jnp.copy, begin), run.hp)  # the reference stays

    if found is None:
        states = [engine.place(map(first, engine.runs)) for engine in engines]
    bundles, rest = [], iter(metas)
    for engine, state in zip(engines, states, strict=True):
        own = list(itertools.islice(rest, len(engine.runs)))
        streams = [open_stream(run, workers=run.config.data.workers) for run in engine.runs]
        for stream, meta in zip(streams, own, strict=True):
            stream.position = meta.get("position", stream.position)
        reference, frozen, origins = None, None, [None for _ in own]
        adapts = engine.runs[0].model.lora_rank > 0
        if adapts or engine.runs[0].needs_reference:
            stored = [meta.get("reference") for meta in own]  # None in checkpoints of before
            found = list(map(weights, engine.runs, stored))
            origins = [given[run.config.init_from][1] for run in engine.runs]
            frozen = engine.share(Frozen(found[0])) if adapts else None
            if engine.runs[0].needs_reference:
                reference = engine.place([NO_ADAPTERS] * len(found) if adapts else found)
        bundles.append(Bundle(engine, state, reference, tuple(streams), tuple(origins), frozen))
    return bundles, latest


def check_memory(run: Settings) -> None:
    """Refuse a policy that the devices have no room for, before XLA looks for it.

    Raises:
      ValueError: the state and a gradient are larger than a device's memory.
    """

    def size(tree):
        leaves = jax.tree.leaves(tree)
        shapes = [x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in leaves]
        return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(shapes, leaves, strict=True))

    state, device = learner.abstract(run.hp), jax.local_devices()[0]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    memory = (device.memory_stats() or {}).get("bytes_limit", machine)
    needed = size(state) + size(state.params) + size(learner.abstract_frozen(run.hp))
    if needed > memory:
        raise ValueError(
            f"config.model: its parameters, moments and gradients take {needed / 2**30:,.1f} GiB "
            f"of a device, which has {memory / 2**30:,.1f}: must be smaller, or have a config.mesh "
            "of more devices"
        )


def _restore_newest(
    engines: Sequence[Any], checkpoints: Checkpoints, alone: bool
) -> tuple[int, list[TrainState], list[dict]] | None:
    """The newest checkpoint that is whole: iteration, states of engines, meta of each run.

    Raises:
      DamagedError: every checkpoint is.
    """
    while (latest := distributed.broadcast_from_first(checkpoints.latest())) is not None:
        damage = None
        try:
            found = _restore(engines, checkpoints, latest, alone)
        except DamagedError as error:
            damage = error
        if not distributed.any_process(damage is not None):
            return latest, *found
        damage = damage or DamagedError(f"another process cannot read the checkpoint of {latest}")
        older = distributed.broadcast_from_first(checkpoints.latest(before=latest))
        if older is None:
            raise damage
        logging.warning("%s. Going on from iteration %d; it is set aside.", damage, older)
        checkpoints.set_aside(latest)
    return None


def _restore(
    engines: Sequence[Any], checkpoints: Checkpoints, iteration: int, alone: bool
) -> tuple[list[TrainState], list[dict]]:
    """The states of the engines, and what else is known of each run."""
    wanted = learner.abstract(engines[0].runs[0].hp)
    if alone:
        state, meta = checkpoints.restore(iteration, wanted, finite=True)
        return [engines[0].place([state])], [meta]
    if isinstance(engines[0], Streamed):  # R engines
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(engines), *x.shape), x.dtype), wanted
        )
        state, meta = checkpoints.restore(iteration, wanted, finite=True)
        state = jax.device_get(state)
        states = [engine.place([pick(state, r)]) for r, engine in enumerate(engines)]
    else:
        state, meta = checkpoints.restore(iteration, engines[0].abstract(wanted), finite=True)
        states = [state]
    runs = range(sum(len(engine.runs) for engine in engines))
    return states, [{key[:-1]: of_runs[r] for key, of_runs in meta.items()} for r in runs]


def save(
    checkpoints: Checkpoints,
    iteration: int,
    bundles: Sequence[Bundle],
    positions: Sequence[dict],
    *,
    alone: bool,
    score: float | None = None,
) -> None:
    """Start saving what `start` restores: runs and where their streams are.

    A score is of a run alone.

    Raises:
      ValueError: a number of a state is not finite.
    """
    metas = _metas(bundles, positions)
    if alone:
        checkpoints.save(iteration, bundles[0].state, metas[0], score=score, finite=True)
        return
    meta = {f"{key}s": [meta[key] for meta in metas] for key in metas[0]}
    checkpoints.save(iteration, _together(bundles), meta, finite=True)


def _metas(bundles: Sequence[Bundle], positions: Sequence[dict]) -> list[dict]:
    """What is saved of each run besides its state."""
    origins = [o for b in bundles for o in b.origins or [None] * len(b.streams)]
    each = zip(positions, origins, strict=True)
    return [{"position": at} | ({"reference": origin} if origin else {}) for at, origin in each]


def each_state(bundles: Sequence[Bundle]) -> Iterator[TrainState]:
    """The state of each run of a cohort, as one alone has it, one by one."""
    return (state for b in bundles for state in b.engine.each(b.state))


def _together(bundles: Sequence[Bundle]) -> TrainState:
    """The states of a cohort as they are saved, with a leading axis."""
    if isinstance(bundles[0].engine, Streamed):
        return stack(each_state(bundles))
    (bundle,) = bundles
    return bundle.state


def keep_last(bundles: Sequence[Bundle], places: Sequence[epath.Path | None]) -> None:
    """The last checkpoint of each run of a cohort, in its directory, as a run alone leaves it.

    None stands for a run that stopped.
    """
    metas = _metas(bundles, [stream.position for b in bundles for stream in b.streams])
    for state, meta, place in zip(each_state(bundles), metas, places, strict=True):
        if place is None:
            continue
        with Checkpoints(place / "checkpoints") as own:
            iteration = int(state.iteration)
            if distributed.broadcast_from_first(own.latest()) != iteration:
                (*_, last) = read_metrics(place) or [{}]  # none where the directory was deleted
                own.save(iteration, state, meta, score=last.get("eval/pass_at_1"), finite=True)


def check_shared(workdir: epath.Path, config: dict) -> None:
    """Refuse processes that do not see the config that process 0 has just stored.

    Raises:
      RuntimeError: naming them.
    """
    distributed.any_process(False)  # stored before any of them looks
    strange = distributed.all_gather(np.array(read_config(workdir) != config))
    if strange.any():
        raise RuntimeError(
            f"processes {np.flatnonzero(strange).tolist()} have another config than process 0 "
            f"stored in {workdir}, or do not see it: give all processes the same command, and a "
            "--workdir that they share, such as gs://…"
        )


def warm_up(
    bundles: Sequence[Bundle],
    scorer: rewards.Scorer,
    note: Callable[[str], None],
    alone: bool = True,
) -> None:
    """Compile every program by one iteration and one evaluation on completions of length 0.

    Runs whose hyperparameters differ in values only share theirs.
    """
    kinds = {jax.tree.structure(bundle.engine.hp): bundle for bundle in reversed(bundles)}
    for bundle in kinds.values():
        engine, config = bundle.engine, bundle.engine.runs[0].config
        fresh = bundle._replace(streams=tuple(map(open_stream, engine.runs)))

        def say(text):
            note(f"compiling: {text}")

        got = SOURCES[config.source](fresh, 0, Clock(), scorer, say)()
        say("update")
        copy = jax.tree.map(jnp.copy, bundle.state)
        state, _ = engine.learn(copy, got.minibatches, bundle.frozen)
        if alone:
            digests(state)
        if config.eval.every:
            evaluation.held_out(bundle, scorer, say)
    if not alone:
        digests(_together(bundles))
        digests(next(each_state(bundles)))
