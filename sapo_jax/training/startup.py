"""What a run starts from: its state, data and reference policy, and its compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sapo_jax import learner, rewards
from sapo_jax.data import stream as streams
from sapo_jax.model import hf
from sapo_jax.model import params as parameters
from sapo_jax.parallel import distributed
from sapo_jax.training import build, checkpoint, evaluation, experience
from sapo_jax.training import workdir as rundir
from sapo_jax.training.progress import Clock
from sapo_jax.training.settings import Settings
from sapo_jax.types import TrainState


def start(
    settings: Settings, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, streams.Stream, Any]:
    """State, data stream and reference policy: of the newest checkpoint, or of a new run."""
    c, latest = settings.config, distributed.broadcast_from_first(checkpoints.latest())
    wanted = learner.abstract(settings.hp)
    to_reference = settings.needs_reference
    weights = None
    if c.init_from and (latest is None or to_reference):
        weights = _place(settings, _weights(settings, wanted.params))
    stream = experience.open_stream(settings, workers=c.data.workers)
    if latest is None:
        start = random_parameters(settings) if weights is None else weights
        state = learner.init(jax.tree.map(jnp.copy, start), settings.hp)
    else:
        state, meta = checkpoints.restore(latest, wanted)
        stream.position = meta["position"]
    reference = weights if to_reference else None
    return _place(settings, state), stream, reference


def random_parameters(settings: Settings) -> Any:
    """Initial parameters, on a mesh each part where it belongs from the start."""
    shape, seed, mesh = settings.model, settings.config.seed, settings.mesh
    if mesh is None:
        return parameters.init(shape, seed)
    places = parameters.shardings(shape, mesh)
    return jax.jit(parameters.init, static_argnums=0, out_shardings=places)(shape, seed)


def _place(settings: Settings, tree: Any) -> Any:
    """The tree on one device; on a mesh it lies there already."""
    return jax.device_put(tree, jax.devices()[0]) if settings.mesh is None else tree


def _weights(settings: Settings, abstract: Any) -> Any:
    """The parameters that ``init_from`` names: of a Hugging Face directory, or of a run."""
    c = settings.config
    source = epath.Path(c.init_from).expanduser()
    if build.is_hf(c.init_from):
        return hf.load(source, dtype=c.dtype.params, mesh=settings.mesh)[1]
    return checkpoint.restore_params(source / "checkpoints", abstract)


def check_shared(workdir: epath.Path, config: dict) -> None:
    """Refuse processes that do not see the config that process 0 has just stored.

    Raises:
      RuntimeError: naming them.
    """
    distributed.any_process(False)  # stored before any of them looks
    strange = distributed.all_gather(np.array(rundir.read_config(workdir) != config))
    if strange.any():
        raise RuntimeError(
            f"processes {np.flatnonzero(strange).tolist()} have another config than process 0 "
            f"stored in {workdir}, or do not see it: give all processes the same command, and a "
            "--workdir that they share, such as gs://…"
        )


def warm_up(
    settings: Settings,
    state: TrainState,
    reference: Any,
    scorer: rewards.Scorer,
    notes: Sequence[Callable[[str], None]],
) -> None:
    """Compile every program by one iteration and one evaluation on completions of length 0."""

    def note(text):
        for each in notes:
            each(f"compiling: {text}")

    examples = experience.open_stream(settings)
    collect = experience.SOURCES[settings.config.source]
    got = collect(settings, state.params, reference, examples, 0, Clock(), scorer, note)
    note("update")
    learner.learn(jax.tree.map(jnp.copy, state), got.minibatches, settings.hp)
    if settings.config.eval.every:
        evaluation.held_out(settings, state.params, scorer, note)
