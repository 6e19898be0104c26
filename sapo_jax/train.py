"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from sapo_jax import cli, rewards
from sapo_jax.parallel import distributed
from sapo_jax.training import evaluation, provenance, startup
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.engine import Bundle, Streamed
from sapo_jax.training.experience import SOURCES
from sapo_jax.training.lease import Lease
from sapo_jax.training.progress import Clock, Progress, mean_of
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import (
    Metrics,
    check_config,
    check_workdir,
    cut_samples,
    write_config,
    write_samples,
)


class Edge(NamedTuple):
    """What a loop has to do with the world."""

    workdir: epath.Path  # with the checkpoints and the lease
    places: Sequence[epath.Path]  # of the files of each run: the same directory for a run alone
    checkpoints: Checkpoints
    scorer: rewards.Scorer
    watchdog: distributed.Watchdog
    preempted: distributed.Preemption
    bar: Progress

    @property
    def alone(self) -> bool:
        """Whether the loop is of one run by itself, not of a cohort."""
        return list(self.places) == [self.workdir]

    def note(self, text: str) -> None:
        """Say what is going on."""
        self.watchdog.beat(text)
        self.bar.note(text)


def run(settings: Settings, workdir: epath.PathLike) -> epath.Path | None:
    """Train, or go on training, in a run directory.

    Returns:
      The path of the report, which process 0 writes; None where SIGTERM asked to stop, and the run
      was saved.

    Raises:
      ValueError: the directory belongs to a run with another config, or to something else, or a
        checkpoint that is needed cannot be restored.
      RuntimeError: another process works in the directory.
    """
    with Progress(settings.config.iterations, settings.config.name) as bar:
        whole = run_all([Streamed(settings)], workdir, [workdir], bar)
    return epath.Path(workdir) / "report.html" if whole and jax.process_index() == 0 else None


def run_all(
    engines: Sequence[Any],
    workdir: epath.PathLike,
    places: Sequence[epath.PathLike],
    bar: Progress,
) -> bool:
    """Train, or go on training, the runs of engines.

    Args:
      engines: from `training.engine` or `sweep.population`; their runs differ in traced values.
      workdir: where their checkpoints are, as one.
      places: the directory of each run; `workdir` for a run alone.
      bar: moves by one for each iteration of each run, those of before a restart included.

    Returns:
      Whether the runs are complete; False where SIGTERM asked to stop, and they were saved.

    Raises:
      ValueError, RuntimeError: as `run`.
    """
    workdir, places = epath.Path(workdir), [epath.Path(place) for place in places]
    runs = [run for engine in engines for run in engine.runs]
    first = runs[0]
    for place in places:  # before the lease makes files there
        check_workdir(place)
    with distributed.only_first(Lease(workdir)):
        for one, place in zip(runs, places, strict=True):
            check_config(place, one.plain, may_differ=one.may_differ)
        with (
            Checkpoints(workdir / "checkpoints") as checkpoints,
            rewards.Scorer(first.task, first.recipe, workers=first.config.reward.workers) as scorer,
            distributed.Watchdog(
                first.config.distributed.timeout, index=jax.process_index()
            ) as watchdog,
            distributed.preemption() as preempted,
        ):
            edge = Edge(workdir, places, checkpoints, scorer, watchdog, preempted, bar)
            bundles, whole = _loop(engines, edge)
            if whole and not edge.alone:
                checkpoints.wait()
                startup.keep_last(bundles, places)
        if whole and jax.process_index() == 0:
            for place in places:
                report(place)
    return whole


def report(workdir: epath.Path) -> None:
    """Write the report, where this machine can draw; the run is complete without it."""
    try:
        from sapo_jax.report.run import write

        write(workdir)
    except ImportError as error:
        logging.warning("No report: %s", cli.missing(error))
    except Exception as error:
        logging.warning("No report of %s: %s: %s", workdir, type(error).__name__, error)


def _loop(engines: Sequence[Any], edge: Edge) -> tuple[list[Bundle], bool]:
    """The iterations that are left; the runs as they stand, and whether all were done."""
    runs = [run for engine in engines for run in engine.runs]
    c, total = runs[0].config, runs[0].config.iterations
    bundles, done = startup.start(engines, edge.checkpoints, alone=edge.alone)
    for one, place in zip(runs, edge.places, strict=True):
        write_config(place, one.plain)
        startup.check_shared(place, one.plain)
        cut_samples(place, done)
    edge.bar.skip(len(runs) * done)
    if done >= total:
        return bundles, True
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(Metrics(p, first_iteration=done or -1)) for p in edge.places]
        for place in edge.places:
            provenance.write(place)
        clock = Clock(edge.watchdog.beat)
        traced = range(done + 3, done + 3 + c.profile_steps)
        startup.warm_up(bundles, edge.scorer, edge.note)
        if done == 0 and c.eval.every:
            start = {"iteration": 0, "update": 0}
            _write(edge, logs, [start | found for found in _evaluate(bundles, edge.scorer)])
        for iteration in range(done + 1, total + 1):
            clock.iteration = iteration
            trace = contextlib.nullcontext()
            if iteration in traced:
                trace = jax.profiler.trace(str(edge.workdir / "profile"))
            with trace, clock("iteration"):
                bundles, records, samples = _iterate(bundles, iteration, clock, edge.scorer)
            last = iteration == total
            if c.eval.every and (last or iteration % c.eval.every == 0):
                with clock("eval"):
                    found = _evaluate(bundles, edge.scorer)
                records = [a | b for a, b in zip(records, found, strict=True)]
            # A run's share of the time: added up over the runs, it is the time that passed.
            spent = {key: seconds / len(runs) for key, seconds in clock.lap().items()}
            for record in records:
                record |= spent
                tokens = record["length/mean"] * runs[0].sampled
                record["time/tokens_per_second"] = tokens / record["time/iteration"]
            # Metrics and samples first, then the checkpoint: killed in between, the run goes on
            # from the checkpoint before, and what is of later iterations is cut and written anew.
            # The other way round, it would go on behind records that were never written.
            _write(edge, logs, records)
            for place, rows in zip(edge.places, samples, strict=True):
                if rows and (last or iteration % c.log.samples_every == 0):
                    write_samples(place, iteration, rows)
            # All processes take the same branch: saving is collective.
            stop = distributed.any_process(edge.preempted.requested)
            if last or stop or iteration % c.checkpoint.every == 0:
                with clock("checkpoint"):
                    score = records[0].get("eval/pass_at_1")
                    startup.save(
                        edge.checkpoints, iteration, bundles, alone=edge.alone, score=score
                    )
            edge.bar.step(len(runs))
            if stop:
                break
    return bundles, iteration == total


def _iterate(
    bundles: Sequence[Bundle], iteration: int, clock: Clock, scorer: rewards.Scorer
) -> tuple[list[Bundle], list[dict[str, Any]], list[list[dict]]]:
    """One iteration of all runs: the runs after it, and of each run a record and samples."""
    collect = SOURCES[bundles[0].engine.runs[0].config.source]
    # Threads judge the rows of a bundle while the device goes on with those behind it: all of them
    # sample before the first one waits for verdicts.
    started = [collect(bundle, iteration, clock, scorer) for bundle in bundles]
    after, records, samples = [], [], []
    for bundle, finish in zip(bundles, started, strict=True):
        got = finish()
        with clock("update"):
            state, learnt = bundle.engine.learn(bundle.state, got.minibatches)
        after.append(bundle._replace(state=state))
        samples += got.samples
        count = {"iteration": iteration}
        records += [a | count | b for a, b in zip(learnt, got.metrics, strict=True)]
    return after, records, samples


def _evaluate(bundles: Sequence[Bundle], scorer: rewards.Scorer) -> list[dict[str, float]]:
    return [found for bundle in bundles for found in evaluation.held_out(bundle, scorer)]


def _write(edge: Edge, logs: Sequence[Metrics], records: Sequence[dict[str, Any]]) -> None:
    """Add a record to the metrics of each run, and show what they have in the mean."""
    for log, record in zip(logs, records, strict=True):
        log.write(record)
    edge.bar.show(mean_of(records))
