"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

from typing import Any

import jax
from absl import logging
from etils import epath

from sapo_jax import checkpoint, experience, learner, rundir, startup, streams
from sapo_jax.progress import Clock, Progress
from sapo_jax.settings import Settings
from sapo_jax.types import TrainState


def run(settings: Settings, workdir: epath.PathLike) -> epath.Path:
    """Train, or go on training, in a run directory; returns the path that its report has.

    Raises:
      ValueError: the directory belongs to a run with another config, or a checkpoint that is
        needed cannot be restored.
      RuntimeError: another process works in the directory.
    """
    workdir = epath.Path(workdir)
    with rundir.Lease(workdir):
        rundir.check_config(workdir, settings.config, may_differ=settings.may_differ)
        with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
            state, stream, reference = startup.start(settings, checkpoints)
            rundir.write_config(workdir, settings.config)
            _loop(settings, workdir, checkpoints, state, stream, reference)
        return _report(workdir)


def _report(workdir: epath.Path) -> epath.Path:
    """Write the report, where this machine can draw."""
    try:
        from sapo_jax import report

        return report.write(workdir)
    except ImportError as error:
        logging.warning("No report: %s. Elsewhere: python -m sapo_jax.report %s", error, workdir)
        return workdir / "report.html"


def _loop(
    settings: Settings,
    workdir: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    state: TrainState,
    stream: streams.Stream,
    reference: Any,
) -> None:
    c = settings.config
    collect = experience.SOURCES[c["source"]]
    total, done = c["iterations"], int(state.iteration)
    resumed = checkpoints.latest() is not None
    metrics = rundir.Metrics(workdir, first_iteration=done if resumed else -1)
    rundir.cut_samples(workdir, done)
    if done >= total:
        metrics.close()
        return
    bar, clock = Progress(total, done, c["name"]), Clock()
    startup.warm_up(settings, state, reference, bar)
    if not resumed and c["eval"]["every"]:
        record = {"iteration": 0, "update": 0, **experience.held_out(settings, state.params)}
        metrics.write(record)
        bar.show(record)
    trace = range(done + 3, done + 3 + c["profile_steps"])
    for iteration in range(done + 1, total + 1):
        if trace and iteration == trace[0]:
            jax.profiler.start_trace(str(workdir / "profile"))
        with clock("iteration"):
            got = collect(settings, state.params, reference, stream, iteration, clock)
            with clock("update"):
                state, record = learner.learn(state, got.minibatches, settings.hp)
        if iteration in trace and iteration == min(trace[-1], total):
            jax.profiler.stop_trace()
        record |= {"iteration": iteration, "update": int(state.update), **got.metrics}
        last = iteration == total
        if c["eval"]["every"] and (last or iteration % c["eval"]["every"] == 0):
            with clock("eval"):
                record |= experience.held_out(settings, state.params)
        record |= clock.lap()
        tokens = record["length/mean"] * settings.sampled
        record["time/tokens_per_second"] = tokens / record["time/iteration"]
        metrics.write(record)
        if got.samples and (last or iteration % c["log"]["samples_every"] == 0):
            rundir.write_samples(workdir, iteration, got.samples)
        if last or iteration % c["checkpoint"]["every"] == 0:
            with clock("checkpoint"):
                checkpoints.save(
                    iteration, state, {"position": stream.position},
                    score=record.get("eval/pass_at_1"),
                )  # fmt: skip
        bar.show(record)
        bar.step()
    metrics.close()
    bar.close()
