"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
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
from sapo_jax.training.stopping import Asked, Finished, Stop
from sapo_jax.training.workdir import (
    Metrics,
    check_config,
    check_workdir,
    cut_samples,
    remove_temporary,
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
    stop: Stop
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
      The path of the report, which process 0 writes; None in the others.

    Raises:
      ValueError: the directory belongs to a run with another config, or to something else, or a
        checkpoint that is needed cannot be restored.
      RuntimeError: another process works in the directory.
      cli.Stopped: a signal asked to stop, and the run was saved.
    """
    with Progress(settings.config.iterations, settings.config.name) as bar:
        run_all([Streamed(settings)], workdir, [workdir], bar)
    return epath.Path(workdir) / "report.html" if jax.process_index() == 0 else None


def run_all(
    engines: Sequence[Any],
    workdir: epath.PathLike,
    places: Sequence[epath.PathLike],
    bar: Progress,
) -> None:
    """Train, or go on training, the runs of engines.

    Args:
      engines: from `training.engine` or `sweep.population`; their runs differ in traced values.
      workdir: where their checkpoints are, as one.
      places: the directory of each run; `workdir` for a run alone.
      bar: moves by one for each iteration of each run, those of before a restart included.

    Raises:
      ValueError, RuntimeError, cli.Stopped: as `run`.
    """
    workdir, places = epath.Path(workdir), [epath.Path(place) for place in places]
    runs = [run for engine in engines for run in engine.runs]
    first, lease = runs[0], Lease(workdir)
    alone, minutes = places == [workdir], first.config.checkpoint.minutes
    for place in places:  # before the lease makes files there
        check_workdir(place)
    with distributed.only_first(lease):
        for one, place in zip(runs, places, strict=True):
            check_config(place, one.plain, may_differ=one.may_differ)
        with (
            Checkpoints(workdir / "checkpoints") as checkpoints,
            (stop := Stop(checkpoints, lease, minutes, alone=alone)).signals(),
            rewards.Scorer(first.task, first.recipe, workers=first.config.reward.workers) as scorer,
            distributed.Watchdog(
                first.config.distributed.timeout, index=jax.process_index()
            ) as watchdog,
        ):
            edge = Edge(workdir, places, checkpoints, scorer, watchdog, stop, bar)
            try:
                bundles = _loop(engines, edge)
            except Asked:
                raise stop.leave() from None
            if not alone:
                checkpoints.wait()
                startup.keep_last(bundles, places)
        if jax.process_index() == 0:
            for place in places:
                report(place)


def report(workdir: epath.Path) -> None:
    """Write the report, where this machine can draw; the run is complete without it."""
    try:
        from sapo_jax.report.run import write

        write(workdir)
    except ImportError as error:
        logging.warning("No report: %s", cli.missing(error))
    except Exception as error:
        logging.warning("No report of %s: %s: %s", workdir, type(error).__name__, error)


def _loop(engines: Sequence[Any], edge: Edge) -> list[Bundle]:
    """The iterations that are left; the runs as they stand behind them."""
    runs = [run for engine in engines for run in engine.runs]
    c, total = runs[0].config, runs[0].config.iterations
    bundles, done = startup.start(engines, edge.checkpoints, alone=edge.alone)
    stop = edge.stop
    stop.begin(done, bundles)
    edge.checkpoints.tidy(done)
    for one, place in zip(runs, edge.places, strict=True):
        write_config(place, one.plain)
        startup.check_shared(place, one.plain)
        cut_samples(place, done)
        remove_temporary(place)
    edge.bar.skip(len(runs) * done)
    if done >= total:
        return bundles
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(Metrics(p, first_iteration=done or -1)) for p in edge.places]
        for place in edge.places:
            provenance.write(place)
        clock = Clock(edge.watchdog.beat, stop.pause)
        traced = range(done + 3, done + 3 + c.profile_steps)
        startup.warm_up(bundles, edge.scorer, edge.note)
        if done == 0 and c.eval.every:
            start = {"iteration": 0, "update": 0}
            _write(edge, logs, [start | found for found in _evaluate(bundles, edge)])
        for iteration in range(done + 1, total + 1):
            clock.iteration, last = iteration, iteration == total
            evaluates = c.eval.every > 0 and (last or iteration % c.eval.every == 0)
            trace = contextlib.nullcontext()
            if iteration in traced:
                trace = jax.profiler.trace(str(edge.workdir / "profile"))
            with trace, clock("iteration"):
                hold = partial(stop.hold, evaluates=evaluates)
                found = _iterate(bundles, iteration, clock, edge.scorer, hold)
                bundles, records, samples = found
            if evaluates:
                with clock("eval"):
                    found = _evaluate(bundles, edge)
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
            stop.finish(Finished.now(iteration, bundles, records[0].get("eval/pass_at_1")))
            # All processes take the same branch: saving is collective.
            if stop.wants_saving() or last or iteration % c.checkpoint.every == 0:
                with clock("checkpoint"):
                    stop.save()
            stop.release()
            edge.bar.step(len(runs))
            if not last:
                stop.check()
    return bundles


def _iterate(
    bundles: Sequence[Bundle],
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    hold: Callable[[], None] = lambda: None,
) -> tuple[list[Bundle], list[dict[str, Any]], list[list[dict]]]:
    """One iteration of all runs: the runs after it, and of each run a record and samples.

    It can be left where the clock checks, also between the updates of two runs, since `hold` has
    seen to the states that updates take the buffers of.
    """
    collect = SOURCES[bundles[0].engine.runs[0].config.source]
    # Threads judge the rows of a bundle while the device goes on with those behind it: all of them
    # sample before the first one waits for verdicts.
    started = [collect(bundle, iteration, clock, scorer) for bundle in bundles]
    after, records, samples = [], [], []
    for bundle, finish in zip(bundles, started, strict=True):
        got = finish()
        clock.check()
        if not after:
            hold()
        with clock("update"):
            state, learnt = bundle.engine.learn(bundle.state, got.minibatches)
        after.append(bundle._replace(state=state))
        samples += got.samples
        count = {"iteration": iteration}
        records += [a | count | b for a, b in zip(learnt, got.metrics, strict=True)]
    return after, records, samples


def _evaluate(bundles: Sequence[Bundle], edge: Edge) -> list[dict[str, float]]:
    pause, held_out = edge.stop.pause, evaluation.held_out
    return [x for bundle in bundles for x in held_out(bundle, edge.scorer, on_segment=pause)]


def _write(edge: Edge, logs: Sequence[Metrics], records: Sequence[dict[str, Any]]) -> None:
    """Add a record to the metrics of each run, and show what they have in the mean."""
    for log, record in zip(logs, records, strict=True):
        log.write(record)
    edge.bar.show(mean_of(records))
