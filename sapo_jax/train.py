"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from sapo_jax import rewards
from sapo_jax.parallel import distributed, sharding
from sapo_jax.training import evaluation, parameters, provenance, queue, startup
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.checks import require
from sapo_jax.training.collapse import Collapse
from sapo_jax.training.engine import Bundle, Streamed
from sapo_jax.training.experience import SOURCES
from sapo_jax.training.lease import Lease
from sapo_jax.training.progress import Clock, Progress, Skips, mean_of
from sapo_jax.training.settings import Settings
from sapo_jax.training.stopping import Finished, Interrupted, Stop
from sapo_jax.training.tracker import listed
from sapo_jax.training.workdir import (
    Metrics,
    check_config,
    check_workdir,
    cut_samples,
    gaps,
    read_metrics,
    remove_temporary,
    write_config,
    write_samples,
)

UPDATING = "updating"


class NotFiniteError(RuntimeError):
    """Runs stopped, since a number of theirs was not finite again and again.

    Attributes:
      stopped: name of a run's directory → why.
    """

    def __init__(self, stopped: dict[str, str]):
        self.stopped = stopped
        super().__init__("; ".join(f"{name}: {why}" for name, why in stopped.items()))


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

    def show(self, place: epath.Path, iteration: int, rows: list[dict]) -> None:
        """Write samples of a run, which may all lie in another process than the one that writes."""
        if rows := rows if self.alone else distributed.first_of(rows):
            write_samples(place, iteration, rows)

    def tell(self, bundles: Sequence[Bundle], doing: str, number: int) -> None:
        """Say at which of several bundles the work is; where it is updates, one more is done."""
        if len(bundles) > 1:
            self.note(f"{doing} run {number + 1} of {len(bundles)}")
        if number and doing == UPDATING:
            self.bar.step(len(bundles[0].engine.runs))


def run(settings: Settings, workdir: epath.PathLike) -> epath.Path | None:
    """Train, or go on training, in a run directory.

    Returns:
      The path of the report, which process 0 writes; None in the others.

    Raises:
      ValueError: the directory belongs to a run with another config, or to something else, or a
        checkpoint that is needed cannot be restored.
      RuntimeError: another process works in the directory.
      NotFiniteError: see `progress.Skips`.
      cli.Stopped: a signal asked to stop, and the run was saved.
    """
    count = sharding.runs(settings.mesh)
    require(count == 1, "mesh.run", count, "1 for a run by itself; several are of a sweep")
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
      NotFiniteError: when the other runs have ended.
    """
    workdir, places = epath.Path(workdir), [epath.Path(place) for place in places]
    runs = [run for engine in engines for run in engine.runs]
    first, lease = runs[0], Lease(workdir)
    alone, minutes = places == [workdir], first.config.checkpoint.minutes
    for place in places:  # before the lease makes files there
        check_workdir(place)
    done = Checkpoints(workdir / "checkpoints").latest() or 0
    for name in () if done else {run.config.init_from for run in runs}:
        parameters.find_start(name)
    with distributed.only_first(lease):
        for one, place in zip(runs, places, strict=True):
            check_config(place, one.plain, may_differ=one.may_differ)
        least = f"at least {done}: {workdir} has done these; with a larger number it goes on"
        require(first.config.iterations >= done, "iterations", first.config.iterations, least)
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
                bundles, skips = _loop(engines, edge)
            except Interrupted:
                raise stop.leave() from None
            stopped = {p: skip.why for p, skip in zip(places, skips, strict=True) if skip.why}
            if not alone:
                checkpoints.wait()
                startup.keep_last(bundles, [None if p in stopped else p for p in places])
        if jax.process_index() == 0:
            for place in places:
                report(place)
    if stopped:
        raise NotFiniteError({place.name: why for place, why in stopped.items()})


def report(workdir: epath.Path) -> None:
    """Write the report, where this machine can draw; the run is complete without it."""
    try:
        from sapo_jax.report.run import write
    except ImportError:
        return  # see `no_page`
    try:
        write(workdir)
    except Exception as error:
        logging.warning("No report of %s: %s: %s", workdir, type(error).__name__, error)


def _begin(edge: Edge, run: Settings, place: epath.Path, done: int) -> tuple[Skips, Collapse]:
    """Make the files of a run those of its first iterations; says which records are missing."""
    records = [r for r in read_metrics(place) if r["iteration"] <= done] if done else []
    skips = Skips(run.config.learner.max_skipped, records)
    last = records[-1]["iteration"] if skips.why else done
    if done and (lost := gaps(records, 0 if run.config.eval.every else 1, last)):
        text = "%s/metrics has no records of the iterations %s: lines or parts of it were lost"
        logging.warning(text, place, lost)
    if edge.alone:
        skips.why = ""  # what stopped it before may be allowed now
    write_config(place, run.plain)
    startup.check_shared(place, run.plain)
    cut_samples(place, done)
    remove_temporary(place)
    return skips, Collapse(vars(run.config.collapse), records)


def _loop(engines: Sequence[Any], edge: Edge) -> tuple[list[Bundle], list[Skips]]:
    """The iterations that are left; the runs as they stand behind them."""
    begun = time.perf_counter()
    runs = [run for engine in engines for run in engine.runs]
    c, total = runs[0].config, runs[0].config.iterations
    bundles, done = startup.start(engines, edge.checkpoints, alone=edge.alone)
    stop = edge.stop
    stop.begin(done, bundles)
    edge.checkpoints.tidy(done)
    past = [_begin(edge, *each, done) for each in zip(runs, edge.places, strict=True)]
    skips, collapses = (list(each) for each in zip(*past, strict=True))
    edge.bar.skip(len(runs) * done)
    if done >= total:
        return bundles, skips
    with contextlib.ExitStack() as stack:
        options = {"first_iteration": done or -1, "trackers": listed(c.log.trackers)}
        logs = [stack.enter_context(Metrics(place, **options)) for place in edge.places]
        for place in edge.places:
            provenance.write(place)
        clock = Clock(edge.watchdog.beat, stop.pause)
        startup.warm_up(bundles, edge.scorer, edge.note, edge.alone)
        if done == 0 and c.eval.every:
            before = [{"iteration": 0, "update": 0} | found for found in _evaluate(bundles, edge)]
            _write(edge, logs, skips, collapses, before)
        clock.add("startup", time.perf_counter() - begun)
        for iteration in range(done + 1, total + 1):
            clock.iteration, last = iteration, iteration == total
            evaluates = c.eval.every > 0 and (last or iteration % c.eval.every == 0)
            trace = contextlib.nullcontext()
            if 2 < iteration - done <= 2 + c.profile_steps:
                trace = jax.profiler.trace(str(edge.workdir / "profile"))
            with trace, clock("iteration"):
                hold, tell = partial(stop.hold, evaluates=evaluates), partial(edge.tell, bundles)
                bundles, records, samples = _iterate(
                    bundles, iteration, clock, edge.scorer, hold, tell
                )
            if evaluates:
                with clock("eval"):
                    found = _evaluate(bundles, edge)
                records = [a | b for a, b in zip(records, found, strict=True)]
            _add_times(records, clock.lap(), runs[0].sampled)
            # Metrics and samples first, then the checkpoint: killed in between, the run goes on
            # from the checkpoint before, and what is of later iterations is cut and written anew.
            # The other way round, it would go on behind records that were never written.
            _write(edge, logs, skips, collapses, records)
            for place, skip, rows in zip(edge.places, skips, samples, strict=True):
                if not skip.why and (last or iteration % c.log.samples_every == 0):
                    edge.show(place, iteration, rows)
            stop.finish(Finished.now(iteration, bundles, records[0].get("eval/pass_at_1")))
            if all(skip.why for skip in skips):
                stop.release()
                break
            # All processes take the same branch: saving is collective.
            due = iteration % c.checkpoint.every == 0 and not any(skip.doubtful for skip in skips)
            if stop.wants_saving() or last or due:
                with clock("checkpoint"):
                    stop.save()
            stop.release()
            edge.bar.step(len(bundles[0].engine.runs))
            if not last:
                stop.check()
    return bundles, skips


def _add_times(records: Sequence[dict[str, Any]], spent: dict[str, float], sampled: int) -> None:
    """A run's share of the time: added up over the runs, it is the time that passed."""
    for record in records:
        record |= {key: seconds / len(records) for key, seconds in spent.items()}
        ended = sampled * (1 - record.get("sampler/goes_on", 0.0))
        tokens = record["length/mean"] * ended if ended else 0.0
        record["time/tokens_per_second"] = tokens / record["time/iteration"]


def _iterate(
    bundles: Sequence[Bundle],
    iteration: int,
    clock: Clock,
    scorer: rewards.Scorer,
    hold: Callable[..., Callable[[], None] | None] = lambda apart: None,
    tell: Callable[[str, int], None] = lambda doing, number: None,
) -> tuple[list[Bundle], list[dict[str, Any]], list[list[dict]]]:
    """One iteration of all runs: the runs after it, and of each run a record and samples.

    It can be left where the clock checks, and between updates by what `hold` returns, which has
    seen to the states that updates take the buffers of.
    """
    run = bundles[0].engine.runs[0]
    due = queue.due(run, len(bundles[0].waiting), iteration)
    # With devices of its own, the sampler works while an update learns from what waits already.
    apart = run.config.sampler.devices > 0 and len(due) == 1 <= len(bundles[0].waiting)
    collect = partial(SOURCES[run.config.source], policy_step=iteration, apart=apart)
    if apart:  # before the thread begins, which may be left where updates may
        between = hold(apart=True)
    # Threads judge the rows of a bundle while the device goes on with those behind it: all of them
    # sample before the first one waits for verdicts.
    started = []
    for number, bundle in enumerate(bundles):
        tell("sampling", number)
        started.append([collect(bundle, batch, clock, scorer) for batch in due])
    after, records, samples = [], [], []
    for number, (bundle, finishes) in enumerate(zip(bundles, started, strict=True)):
        tell(UPDATING, number)
        waiting = [*bundle.waiting, *(finish() for finish in finishes if not apart)]
        got = waiting.pop(0)
        clock.check()
        if number == 0 and not apart:
            between = hold(apart=False)
        minibatches = _separated(got.minibatches, between) if between else got.minibatches
        with clock("update"):
            state, learnt = bundle.engine.learn(bundle.state, minibatches, bundle.frozen)
        if apart:
            waiting += [finish() for finish in finishes]
            clock.overlap("rollout", "update")
        after.append(bundle._replace(state=state, waiting=tuple(waiting)))
        samples += got.samples
        each = zip(bundle.engine.runs, learnt, got.metrics, got.steps, strict=True)
        for run, own, more, steps in each:
            more = more | queue.ages(steps, iteration) | run.scheduled(iteration)
            records.append(own | {"iteration": iteration} | more)
    return after, records, samples


def _separated(minibatches: Sequence[Any], between: Callable[[], None]) -> Iterator[Any]:
    for minibatch in minibatches:
        between()
        yield minibatch


def _evaluate(bundles: Sequence[Bundle], edge: Edge) -> list[dict[str, float]]:
    found = []
    for number, bundle in enumerate(bundles):
        edge.tell(bundles, "evaluating", number)
        found += evaluation.held_out(bundle, edge.scorer, on_segment=edge.stop.pause)
    return found


def _write(
    edge: Edge,
    logs: Sequence[Metrics],
    skips: Sequence[Skips],
    collapses: Sequence[Collapse],
    records: Sequence[dict[str, Any]],
) -> None:
    """Add a record to the metrics of each run that goes on, and show what they have in the mean."""
    each = zip(edge.places, logs, skips, collapses, records, strict=True)
    going = [run for run in each if not run[2].why]
    for place, log, skip, collapse, record in going:
        collapse.add(record)
        if "reward/mean" in record:
            record["run/collapsed_at"] = collapse.since()
        log.write(record)
        skip.add(record)
        if skip.why and not edge.alone:
            logging.warning("%s stops. %s", place.name, skip.why)
    edge.bar.show(mean_of([record for *_, record in going]))
