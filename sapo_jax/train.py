"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
from absl import logging
from etils import epath

from sapo_jax import cli, learner, rewards
from sapo_jax.parallel import distributed
from sapo_jax.training import checkpoint, evaluation, experience, provenance, startup
from sapo_jax.training import workdir as rundir
from sapo_jax.training.lease import Lease
from sapo_jax.training.progress import Clock, Profile, Progress
from sapo_jax.training.settings import Settings


class Edge(NamedTuple):
    """What a run has to do with the world."""

    workdir: epath.Path
    checkpoints: checkpoint.Checkpoints
    scorer: rewards.Scorer
    watchdog: distributed.Watchdog
    preempted: distributed.Preemption


def run(settings: Settings, workdir: epath.PathLike) -> epath.Path | None:
    """Train, or go on training, in a run directory.

    Returns:
      The path of the report, which process 0 writes; None where SIGTERM asked to stop, and the run
      was saved.

    Raises:
      ValueError: the directory belongs to a run with another config, or a checkpoint that is
        needed cannot be restored.
      RuntimeError: another process works in the directory.
    """
    workdir = epath.Path(workdir)
    with distributed.only_first(Lease(workdir)):
        rundir.check_config(workdir, settings.plain, may_differ=settings.may_differ)
        with open_edge(settings, workdir) as edge:
            whole = _loop(settings, edge)
        return report(workdir) if whole and jax.process_index() == 0 else None


@contextlib.contextmanager
def open_edge(settings: Settings, workdir: epath.Path) -> Iterator[Edge]:
    """What a run needs while it goes on."""
    workers, timeout = (
        settings.config.reward.workers,
        settings.config.distributed.timeout,
    )
    with (
        checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints,
        rewards.Scorer(settings.task, settings.recipe, workers=workers) as scorer,
        distributed.Watchdog(timeout, index=jax.process_index()) as watchdog,
        distributed.preemption() as preempted,
    ):
        yield Edge(workdir, checkpoints, scorer, watchdog, preempted)


def report(workdir: epath.Path) -> epath.Path:
    """Write the report, where this machine can draw; returns its path all the same."""
    try:
        from sapo_jax.report.run import write

        return write(workdir)
    except ImportError as error:
        logging.warning("No report: %s", cli.missing(error))
        return workdir / "report.html"


def _loop(settings: Settings, edge: Edge) -> bool:
    """The iterations that are left; returns whether all of them were done."""
    c = settings.config
    state, stream, reference = startup.start(settings, edge.checkpoints)
    rundir.write_config(edge.workdir, settings.plain)
    startup.check_shared(edge.workdir, settings.plain)
    collect = partial(experience.SOURCES[c.source], settings, scorer=edge.scorer)
    held_out = partial(evaluation.held_out, settings, scorer=edge.scorer)
    total, done = c.iterations, int(state.iteration)
    resumed = done > 0
    rundir.cut_samples(edge.workdir, done)
    with rundir.Metrics(edge.workdir, first_iteration=done if resumed else -1) as metrics:
        if done >= total:
            return True
        provenance.write(edge.workdir)
        bar, clock = Progress(total, done, c.name), Clock(edge.watchdog.beat)
        profile = Profile(edge.workdir / "profile", done + 3, c.profile_steps)
        notes = (edge.watchdog.beat, bar.note)
        startup.warm_up(settings, state, reference, edge.scorer, notes)
        if not resumed and c.eval.every:
            record = {"iteration": 0, "update": 0, **held_out(state.params)}
            metrics.write(record)
            bar.show(record)
        for iteration in range(done + 1, total + 1):
            clock.iteration = iteration
            with profile(iteration), clock("iteration"):
                got = collect(state.params, reference, stream, iteration, clock)
                with clock("update"):
                    state, record = learner.learn(state, got.minibatches, settings.hp)
            record |= {"iteration": iteration, "update": int(state.update), **got.metrics}
            last = iteration == total
            if c.eval.every and (last or iteration % c.eval.every == 0):
                with clock("eval"):
                    record |= held_out(state.params)
            record |= clock.lap()
            tokens = record["length/mean"] * settings.sampled
            record["time/tokens_per_second"] = tokens / record["time/iteration"]
            metrics.write(record)
            if got.samples and (last or iteration % c.log.samples_every == 0):
                rundir.write_samples(edge.workdir, iteration, got.samples)
            stop = distributed.any_process(edge.preempted.requested)
            if last or stop or iteration % c.checkpoint.every == 0:
                meta, score = {"position": stream.position}, record.get("eval/pass_at_1")
                with clock("checkpoint"):
                    edge.checkpoints.save(iteration, state, meta, score=score)
            bar.show(record)
            bar.step()
            if stop:
                break
        bar.close()
    return iteration == total
