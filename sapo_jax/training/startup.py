"""Where runs start and stop: their first state or that of a checkpoint, compiled programs, saves.

A run alone has a checkpoint of its state. The runs of a cohort have one together, with a leading
axis R on every array, and at their end each its own, as a run alone.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sapo_jax import learner, rewards
from sapo_jax.model import hf, params
from sapo_jax.parallel import distributed
from sapo_jax.training import build, evaluation
from sapo_jax.training.checkpoint import Checkpoints, restore_params
from sapo_jax.training.engine import Bundle, Streamed, pick, stack
from sapo_jax.training.experience import SOURCES, open_stream
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import read_config, read_metrics
from sapo_jax.types import TrainState


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
    latest = distributed.broadcast_from_first(checkpoints.latest())
    given: dict[str, Any] = {}  # read and placed once for all runs that start from it

    def weights(run):
        if run.config.init_from not in given:
            given[run.config.init_from] = Streamed(run).place([_weights(run)])
        return given[run.config.init_from]

    def first(run):
        begin = weights(run) if run.config.init_from else random_parameters(run)
        return learner.init(jax.tree.map(jnp.copy, begin), run.hp)  # the reference stays

    runs = [run for engine in engines for run in engine.runs]
    check_memory(runs[0])
    streams = [open_stream(run, workers=run.config.data.workers) for run in runs]
    if latest is None:
        states = [engine.place(map(first, engine.runs)) for engine in engines]
    else:
        states, positions = _restore(engines, checkpoints, latest, alone)
        for stream, position in zip(streams, positions, strict=True):
            stream.position = position
    bundles, rest = [], iter(streams)
    for engine, state in zip(engines, states, strict=True):
        referred = engine.runs[0].needs_reference
        reference = engine.place(map(weights, engine.runs)) if referred else None
        own = tuple(itertools.islice(rest, len(engine.runs)))
        bundles.append(Bundle(engine, state, reference, own))
    return bundles, latest or 0


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
    needed = size(state) + size(state.params)
    if needed > memory:
        raise ValueError(
            f"config.model: its parameters, moments and gradients take {needed / 2**30:,.1f} GiB "
            f"of a device, which has {memory / 2**30:,.1f}: must be smaller, or have a config.mesh "
            "of more devices"
        )


def _restore(
    engines: Sequence[Any], checkpoints: Checkpoints, iteration: int, alone: bool
) -> tuple[list[TrainState], list[dict]]:
    """The states of the engines, and the positions of all streams."""
    wanted = learner.abstract(engines[0].runs[0].hp)
    if alone:
        state, meta = checkpoints.restore(iteration, wanted)
        return [engines[0].place([state])], [meta["position"]]
    count, where = sum(len(engine.runs) for engine in engines), engines[0].where
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=where), wanted
    )
    state, meta = checkpoints.restore(iteration, wanted)
    state = jax.device_get(state)
    each = (pick(state, r) for r in range(count))
    states = [engine.place([next(each) for _ in engine.runs]) for engine in engines]
    return states, meta["positions"]


def save(
    checkpoints: Checkpoints,
    iteration: int,
    bundles: Sequence[Bundle],
    *,
    alone: bool,
    score: float | None = None,
) -> None:
    """Start saving what `start` restores; ``score`` is of a run alone."""
    positions = [stream.position for bundle in bundles for stream in bundle.streams]
    if alone:
        checkpoints.save(iteration, bundles[0].state, {"position": positions[0]}, score=score)
    else:
        checkpoints.save(iteration, stack(each_state(bundles)), {"positions": positions})


def each_state(bundles: Sequence[Bundle]) -> list[TrainState]:
    """The state of each run, on the host."""
    return [state for b in bundles for state in b.engine.to_host(b.state)]


def keep_last(bundles: Sequence[Bundle], places: Sequence[epath.Path]) -> None:
    """The last checkpoint of each run of a cohort, in its directory, as a run alone leaves it."""
    streams = [stream for bundle in bundles for stream in bundle.streams]
    for state, stream, place in zip(each_state(bundles), streams, places, strict=True):
        with Checkpoints(place / "checkpoints") as own:
            iteration = int(state.iteration)
            if own.latest() != iteration:
                score = read_metrics(place)[-1].get("eval/pass_at_1")
                own.save(iteration, state, {"position": stream.position}, score=score)


def random_parameters(run: Settings) -> Any:
    """Initial parameters, on a mesh each part where it belongs from the start."""
    shape, seed, mesh = run.model, run.config.seed, run.mesh
    if mesh is None:
        return params.init(shape, seed)
    places = params.shardings(shape, mesh)
    return jax.jit(params.init, static_argnums=0, out_shardings=places)(shape, seed)


def _weights(run: Settings) -> Any:
    """The parameters that ``init_from`` names: of a Hugging Face directory, or of a run."""
    source = epath.Path(run.config.init_from).expanduser()
    if build.is_hf(run.config.init_from):
        return hf.load(source, dtype=run.config.dtype.params, mesh=run.mesh)[1]
    return restore_params(source / "checkpoints", learner.abstract(run.hp).params)


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


def warm_up(bundles: Sequence[Bundle], scorer: rewards.Scorer, note: Callable[[str], None]) -> None:
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
        engine.learn(jax.tree.map(jnp.copy, bundle.state), got.minibatches)
        if config.eval.every:
            evaluation.held_out(bundle, scorer, say)
