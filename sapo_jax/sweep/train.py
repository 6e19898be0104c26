"""The loop of a cohort: `train` for R runs, with one checkpoint and a run directory for each."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sapo_jax import train
from sapo_jax.data.stream import Stream
from sapo_jax.parallel import distributed
from sapo_jax.sweep import experience as joint
from sapo_jax.sweep import population, vectorize
from sapo_jax.sweep.cohorts import Cohort
from sapo_jax.sweep.vectorize import pick
from sapo_jax.training import checkpoint, experience, provenance, startup
from sapo_jax.training import workdir as rundir
from sapo_jax.training.lease import Lease
from sapo_jax.training.progress import Clock, Profile, Progress
from sapo_jax.types import TrainState


def run(cohort: Cohort, workdir: epath.PathLike, bar: Progress) -> bool:
    """Train, or go on training, the runs of a cohort in the directories ``<workdir>/<name>``.

    These hold what a run alone leaves, its last checkpoint included: any of them can be evaluated,
    exported, or be what another run starts from. The checkpoints on the way are of all runs as one.

    Args:
      cohort: the runs.
      workdir: of the cohort.
      bar: moves by one for each iteration of each run, those of before a restart included.

    Returns:
      Whether the runs are complete; False where SIGTERM asked to stop, and they were saved.

    Raises:
      ValueError: a directory belongs to a run with another config, or a checkpoint that is needed
        cannot be restored.
      RuntimeError: another process works in the directory.
    """
    workdir = epath.Path(workdir)
    places = [workdir / name for name in cohort.names]
    with Lease(workdir):
        for one, place in zip(cohort.runs, places, strict=True):
            rundir.check_config(place, one.plain, may_differ=one.may_differ)
        with train.open_edge(cohort.lead, workdir) as edge:
            state, streams, whole = _loop(cohort, edge, places, bar)
            if whole:
                edge.checkpoints.wait()
                _keep(places, jax.device_get(state), streams)
                for place in places:
                    edge.watchdog.beat(f"the report of {place}")
                    train.report(place)
    return whole


def _start(
    cohort: Cohort, checkpoints: checkpoint.Checkpoints, places: list[epath.Path]
) -> tuple[TrainState, list[Stream], Any]:
    """`startup.start` of R runs; the newest checkpoint of the cohort replaces what it holds."""
    held, streams = [], []
    for one, place in zip(cohort.runs, places, strict=True):
        own = checkpoint.Checkpoints(place / "checkpoints")
        state, stream, reference = startup.start(one, own)
        # By way of the host: a device keeps its own runs only, and none of them twice.
        held.append(jax.device_get((state, reference)))
        streams.append(stream)
    state, reference = vectorize.stack(held)
    where, latest = vectorize.place(cohort.method, len(held)), checkpoints.latest()
    if latest is not None:
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state
        )
        state, meta = checkpoints.restore(latest, wanted)
        for stream, position in zip(streams, meta["positions"], strict=True):
            stream.position = position
    state, reference = jax.device_put((state, reference), where)
    return state, streams, reference


def _warm_up(cohort: Cohort, state: TrainState, reference: Any, edge: train.Edge, note) -> None:
    """Compile every program on runs that are not live: `stacked.over` computes none of them."""
    live_R = np.zeros(len(cohort.runs), bool)
    fresh = [experience.open_stream(one) for one in cohort.runs]
    note("compiling: sampling")
    collect = joint.SOURCES[cohort.lead.config.source]
    got = collect(cohort, live_R, state.params, reference, fresh, 0, Clock(), edge.scorer)
    note("compiling: update")
    copy = jax.tree.map(jnp.copy, state)
    population.learn(live_R, copy, got.minibatches, cohort.hp, method=cohort.method)
    if cohort.lead.config.eval.every:
        note("compiling: evaluation")
        joint.held_out(cohort, live_R, state.params, edge.scorer)


def _loop(
    cohort: Cohort, edge: train.Edge, places: list[epath.Path], bar: Progress
) -> tuple[TrainState, list[Stream], bool]:
    """The iterations that are left; the state, the streams, and whether all were done."""
    c, runs, live_R = cohort.lead.config, len(cohort.runs), np.ones(len(cohort.runs), bool)
    state, streams, reference = _start(cohort, edge.checkpoints, places)
    collect = partial(joint.SOURCES[c.source], cohort, live_R, scorer=edge.scorer)
    held_out = partial(joint.held_out, cohort, live_R, scorer=edge.scorer)
    total, done = c.iterations, int(state.iteration[0])
    resumed = edge.checkpoints.latest() is not None
    for place, one in zip(places, cohort.runs, strict=True):
        rundir.write_config(place, one.plain)
        rundir.cut_samples(place, done)
    bar.step(runs * done)
    with contextlib.ExitStack() as stack:
        first = done if resumed else -1
        files = [stack.enter_context(rundir.Metrics(p, first_iteration=first)) for p in places]
        if done >= total:
            return state, streams, True
        for place in places:
            provenance.write(place)
        clock = Clock(edge.watchdog.beat)
        profile = Profile(edge.workdir / "profile", done + 3, c.profile_steps)
        _warm_up(cohort, state, reference, edge, bar.note)
        if not resumed and c.eval.every:
            for file, found in zip(files, held_out(state.params), strict=True):
                file.write({"iteration": 0, "update": 0, **found})
        for iteration in range(done + 1, total + 1):
            clock.iteration = iteration
            with profile(iteration), clock("iteration"):
                got = collect(state.params, reference, streams, iteration, clock)
                with clock("update"):
                    arguments = (live_R, state, got.minibatches, cohort.hp)
                    state, records = population.learn(*arguments, method=cohort.method)
            last = iteration == total
            evaluated = [{}] * runs
            if c.eval.every and (last or iteration % c.eval.every == 0):
                with clock("eval"):
                    evaluated = held_out(state.params)
            # A run's share of the time: added up over the runs, it is the time that passed.
            spent = {key: value / runs for key, value in clock.lap().items()}
            for r, record in enumerate(records):
                record |= {"iteration": iteration, "update": int(state.update[r])}
                record |= got.metrics[r] | evaluated[r] | spent
                tokens = record["length/mean"] * cohort.lead.sampled
                record["time/tokens_per_second"] = tokens / record["time/iteration"]
                files[r].write(record)
                if got.samples[r] and (last or iteration % c.log.samples_every == 0):
                    rundir.write_samples(places[r], iteration, got.samples[r])
            stop = distributed.any_process(edge.preempted.requested)
            if last or stop or iteration % c.checkpoint.every == 0:
                meta = {"positions": [stream.position for stream in streams]}
                with clock("checkpoint"):
                    edge.checkpoints.save(iteration, state, meta)
            bar.show(mean_of(records))
            bar.step(runs)
            if stop:
                break
    return state, streams, iteration == total


def mean_of(records: list[dict]) -> dict[str, float]:
    """The means over the runs, for the bar."""
    keys = ("reward/mean", "policy/loss", "eval/pass_at_1", "length/mean", "time/tokens_per_second")
    known = [key for key in keys if all(key in record for record in records)]
    return {key: float(np.mean([record[key] for record in records])) for key in known}


def _keep(places: list[epath.Path], state: TrainState, streams: list[Stream]) -> None:
    """The last checkpoint of each run, in its directory, as a run alone leaves it."""
    for r, place in enumerate(places):
        with checkpoint.Checkpoints(place / "checkpoints") as own:
            iteration = int(state.iteration[r])
            if own.latest() != iteration:
                last = rundir.read_metrics(place)[-1]
                meta, score = {"position": streams[r].position}, last.get("eval/pass_at_1")
                own.save(iteration, pick(state, r), meta, score=score)
