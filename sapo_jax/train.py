"""The loop: experience → updates → metrics → evaluation → checkpoint, resumable at any moment."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sapo_jax import checkpoint, experience, learner, report, rundir, streams
from sapo_jax.model import params as parameters
from sapo_jax.progress import Clock, Progress
from sapo_jax.settings import Settings
from sapo_jax.types import TrainState


def _start(
    settings: Settings, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, streams.Stream, Any]:
    """State, data stream and reference policy: of the newest checkpoint, or of a new run."""
    c, device = settings.config, jax.devices()[0]
    abstract, latest = parameters.abstract(settings.model), checkpoints.latest()
    objective = settings.hp.objective
    to_reference = objective.kl_against == "ref" and objective.hyperparameters["kl_coef"] != 0
    weights = None
    if c["init_from"] and (latest is None or to_reference):
        source = epath.Path(c["init_from"]) / "checkpoints"
        weights = jax.device_put(checkpoint.restore_params(source, abstract), device)
    stream = experience.open_stream(settings, workers=c["data"]["workers"])
    if latest is None:
        start = parameters.init(settings.model, c["seed"]) if weights is None else weights
        state = learner.init(jax.tree.map(jnp.copy, start), settings.hp)
    else:
        wanted = jax.eval_shape(learner.init, abstract, settings.hp)
        state, meta = checkpoints.restore(latest, wanted)
        stream.position = meta["position"]
    reference = weights if to_reference else None
    return jax.device_put(state, device), stream, reference


def _warm_up(settings: Settings, state: TrainState, reference: Any, bar: Progress) -> None:
    """Compile every program by one iteration and one evaluation on completions of length 0."""
    examples = experience.open_stream(settings)
    collect = experience.SOURCES[settings.config["source"]]
    notes = (lambda text: bar.note(f"compiling: {text}"),)
    got = collect(settings, state.params, reference, examples, 0, Clock(), *notes)
    bar.note("compiling: update")
    learner.learn(jax.tree.map(jnp.copy, state), got.minibatches, settings.hp)
    if settings.config["eval"]["every"]:
        experience.held_out(settings, state.params, *notes)


def run(settings: Settings, workdir: epath.PathLike) -> epath.Path:
    """Train, or go on training, in a run directory; returns the path of its report.

    Raises:
      ValueError: the directory belongs to a run with another config, or a checkpoint that is
        needed cannot be restored.
      RuntimeError: another process works in the directory.
    """
    workdir = epath.Path(workdir)
    with rundir.Lease(workdir):
        rundir.check_config(workdir, settings.config, may_differ=settings.may_differ)
        with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
            state, stream, reference = _start(settings, checkpoints)
            rundir.write_config(workdir, settings.config)
            _loop(settings, workdir, checkpoints, state, stream, reference)
        return epath.Path(report.write(workdir))


def _loop(settings, workdir, checkpoints, state, stream, reference) -> None:
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
    _warm_up(settings, state, reference, bar)
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
        if trace and iteration == min(trace[-1], total):
            jax.profiler.stop_trace()
        record |= {"iteration": iteration, "update": int(state.update), **got.metrics}
        last = iteration == total
        if c["eval"]["every"] and (last or iteration % c["eval"]["every"] == 0):
            with clock("eval"):
                record |= experience.held_out(settings, state.params)
        record |= clock.lap()
        tokens = record["length/mean"] * settings.rows
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
