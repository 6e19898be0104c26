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
import numpy as np
from absl import logging
from etils import epath

from sapo_jax import learner, rewards
from sapo_jax.model import lora
from sapo_jax.parallel import distributed
from sapo_jax.training import carry, evaluation, parameters, queue
from sapo_jax.training.checkpoint import Checkpoints, DamagedError, meta_of
from sapo_jax.training.digest import digests
from sapo_jax.training.engine import Bundle, Streamed, copied, pick, stack
from sapo_jax.training.experience import SOURCES, open_stream
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import read_config, read_metrics
from sapo_jax.types import Frozen


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
    latest, saved, metas = found or (0, [], [{} for _ in runs])
    given: dict[str, Any] = {}  # read and placed once for all runs that start from it
    shared: dict[tuple[int, ...], Frozen] = {}  # the same arrays once for engines of as many runs

    def weights(run, origin):
        key = run.config.init_from
        if key not in given:
            params, now = parameters.first(run, origin)
            given[key] = Streamed(run).place([params]), now
        params, now = given[key]
        parameters.check(run, origin, now)
        return params

    def first(run):
        if run.model.lora_rank or not run.config.init_from:  # what is frozen is drawn apart
            return learner.init(parameters.random(run), run.hp)
        begin = lora.trained(weights(run, None), run.model)
        return learner.init(copied(begin), run.hp)  # the reference stays

    if found is None:
        saved = [engine.place(map(first, engine.runs)) for engine in engines]
    bundles, rest = [], iter(metas)
    for engine, arrays in zip(engines, saved, strict=True):
        own = list(itertools.islice(rest, len(engine.runs)))
        state, waiting, begun = queue.unpack(arrays, own)
        carries = carry.first(engine, begun, own[0].get("begun"))
        streams = [open_stream(run, workers=run.config.data.workers) for run in engine.runs]
        for stream, meta in zip(streams, own, strict=True):
            stream.position = meta.get("position", stream.position)
        reference, frozen, origins = None, None, [None for _ in own]
        shape = engine.runs[0].model
        if shape.freezes or engine.runs[0].needs_reference:
            stored = [meta.get("reference") for meta in own]  # None in checkpoints of before
            found = list(map(weights, engine.runs, stored))
            origins = [given[run.config.init_from][1] for run in engine.runs]
            if base := lora.frozen(found[0], shape):
                key = (len(own), *map(id, jax.tree.leaves(base)))
                frozen = shared[key] = shared.get(key) or engine.share(base)
            if engine.runs[0].needs_reference:
                others = [lora.trained(params, shape) for params in found]
                reference = engine.place(others)
        rest_of = (tuple(streams), tuple(origins), frozen, waiting, carries)
        bundles.append(Bundle(engine, state, reference, *rest_of))
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
) -> tuple[int, list[Any], list[dict]] | None:
    """The newest checkpoint that is whole: iteration, arrays of engines, meta of each run.

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
) -> tuple[list[Any], list[dict]]:
    """The arrays of the engines, see `queue.pack`, and what else is known of each run."""
    run, stored = engines[0].runs[0], meta_of(checkpoints.directory, iteration)
    stored = [stored.get("queue", [])] if alone else stored.get("queues", [[]])
    wanted = queue.abstract(run, iteration, learner.abstract(run.hp), [*map(len, stored)])
    if alone:
        state, meta = checkpoints.restore(iteration, wanted, finite=True)
        return [engines[0].place([state])], [meta]
    if isinstance(engines[0], Streamed):  # R engines
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(engines), *x.shape), x.dtype), wanted
        )
        saved, meta = checkpoints.restore(iteration, wanted, finite=True)
        saved = jax.device_get(saved)
        arrays = [engine.place([pick(saved, r)]) for r, engine in enumerate(engines)]
    else:
        saved, meta = checkpoints.restore(iteration, engines[0].abstract(wanted), finite=True)
        arrays = [saved]
    runs = range(sum(len(engine.runs) for engine in engines))
    return arrays, [{key[:-1]: of_runs[r] for key, of_runs in meta.items()} for r in runs]


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
        saved = _packed(bundles[0])
        checkpoints.save(iteration, saved, metas[0], score=score, finite=True)
        return
    meta = {f"{key}s": [meta[key] for meta in metas] for key in metas[0]}
    checkpoints.save(iteration, _together(bundles), meta, finite=True)


def _metas(bundles: Sequence[Bundle], positions: Sequence[dict]) -> list[dict]:
    """What is saved of each run besides its state."""

    def meta(bundle, r, position):
        found = {"position": position}
        if bundle.origins and bundle.origins[r]:
            found["reference"] = bundle.origins[r]
        if bundle.engine.runs[r].config.staleness:
            found["queue"] = queue.meta(bundle.waiting, r)
        if bundle.carry is not None:  # then the bundle is of one run
            found["begun"] = list(bundle.carry.places)
        return found

    each = [(bundle, r) for bundle in bundles for r in range(len(bundle.streams))]
    return [meta(*own, position) for own, position in zip(each, positions, strict=True)]


def each_saved(bundles: Sequence[Bundle]) -> Iterator[Any]:
    """The arrays of each run of a cohort, as one alone has them, one by one: see `queue.pack`."""
    return (saved for b in bundles for saved in b.engine.each(_packed(b)))


def _together(bundles: Sequence[Bundle]) -> Any:
    """The arrays of a cohort as they are saved, with a leading axis."""
    if isinstance(bundles[0].engine, Streamed):
        return stack(each_saved(bundles))
    (bundle,) = bundles
    return _packed(bundle)


def _packed(bundle: Bundle) -> Any:
    begun = bundle.carry and bundle.carry.begun
    return queue.pack(bundle.state, bundle.waiting, begun)


def keep_last(bundles: Sequence[Bundle], places: Sequence[epath.Path | None]) -> None:
    """The last checkpoint of each run of a cohort, in its directory, as a run alone leaves it.

    None stands for a run that stopped.
    """
    metas = _metas(bundles, [stream.position for b in bundles for stream in b.streams])
    for saved, meta, place in zip(each_saved(bundles), metas, places, strict=True):
        if place is None:
            continue
        with Checkpoints(place / "checkpoints") as own:
            iteration = int(queue.unpack(saved, [meta])[0].iteration)
            if distributed.broadcast_from_first(own.latest()) != iteration:
                (*_, last) = read_metrics(place) or [{}]  # none where the directory was deleted
                own.save(iteration, saved, meta, score=last.get("eval/pass_at_1"), finite=True)


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
        streams = tuple(map(open_stream, engine.runs))
        fresh = bundle._replace(streams=streams, carry=carry.first(engine))

        def say(text):
            note(f"compiling: {text}")

        got = SOURCES[config.source](fresh, 0, Clock(), scorer, say)()
        say("update")
        copy = copied(bundle.state)
        state, _ = engine.learn(copy, got.minibatches, bundle.frozen)
        waiting = (got,) if config.staleness else ()
        if alone:
            digests(_packed(bundle._replace(state=state, waiting=waiting)))
        if config.eval.every:
            evaluation.held_out(bundle, scorer, say)
    if not alone:
        bundles = [bundle._replace(waiting=waiting) for bundle in bundles]
        digests(_together(bundles))
        digests(queue.unpack(next(each_saved(bundles)), [])[0])
