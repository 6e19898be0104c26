"""What a run starts from: its state, data and reference policy, and its compiled programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sapo_jax import checkpoint, experience, learner, streams
from sapo_jax.model import params as parameters
from sapo_jax.progress import Clock, Progress
from sapo_jax.settings import Settings
from sapo_jax.types import TrainState


def start(
    settings: Settings, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, streams.Stream, Any]:
    """State, data stream and reference policy: of the newest checkpoint, or of a new run."""
    c, latest = settings.config, checkpoints.latest()
    wanted = learner.abstract(settings.hp)
    objective = settings.hp.objective
    to_reference = objective.kl_against == "ref" and objective.hyperparameters["kl_coef"] != 0
    weights = None
    if c["init_from"] and (latest is None or to_reference):
        source = epath.Path(c["init_from"]) / "checkpoints"
        weights = _place(settings, checkpoint.restore_params(source, wanted.params))
    stream = experience.open_stream(settings, workers=c["data"]["workers"])
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
    shape, seed, mesh = settings.model, settings.config["seed"], settings.mesh
    if mesh is None:
        return parameters.init(shape, seed)
    places = parameters.shardings(shape, mesh)
    return jax.jit(parameters.init, static_argnums=0, out_shardings=places)(shape, seed)


def _place(settings: Settings, tree: Any) -> Any:
    """The tree on one device; on a mesh it lies there already."""
    return jax.device_put(tree, jax.devices()[0]) if settings.mesh is None else tree


def warm_up(settings: Settings, state: TrainState, reference: Any, bar: Progress) -> None:
    """Compile every program by one iteration and one evaluation on completions of length 0."""
    examples = experience.open_stream(settings)
    collect = experience.SOURCES[settings.config["source"]]
    notes = (lambda text: bar.note(f"compiling: {text}"),)
    got = collect(settings, state.params, reference, examples, 0, Clock(), *notes)
    bar.note("compiling: update")
    learner.learn(jax.tree.map(jnp.copy, state), got.minibatches, settings.hp)
    if settings.config["eval"]["every"]:
        experience.held_out(settings, state.params, *notes)
