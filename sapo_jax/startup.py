"""What a run starts from: its state, data and reference policy, and its compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sapo_jax import checkpoint, experience, inputs, learner, rewards, streams
from sapo_jax.model import hf
from sapo_jax.model import params as parameters
from sapo_jax.progress import Clock
from sapo_jax.settings import Settings
from sapo_jax.types import TrainState


def start(
    settings: Settings, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, streams.Stream, Any]:
    """State, data stream and reference policy: of the newest checkpoint, or of a new run."""
    c, device = settings.config, jax.devices()[0]
    abstract, latest = parameters.abstract(settings.model), checkpoints.latest()
    to_reference = settings.needs_reference
    weights = None
    if c["init_from"] and (latest is None or to_reference):
        weights = jax.device_put(_weights(c, abstract), device)
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


def _weights(c: dict, abstract: Any) -> Any:
    """The parameters that ``init_from`` names: of a Hugging Face directory, or of a run."""
    source = epath.Path(c["init_from"]).expanduser()
    if inputs.is_hf(c["init_from"]):
        return hf.load(source, dtype=c["dtype"]["params"])[1]
    return checkpoint.restore_params(source / "checkpoints", abstract)


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
    collect = experience.SOURCES[settings.config["source"]]
    got = collect(settings, state.params, reference, examples, 0, Clock(), scorer, note)
    note("update")
    learner.learn(jax.tree.map(jnp.copy, state), got.minibatches, settings.hp)
    if settings.config["eval"]["every"]:
        experience.held_out(settings, state.params, scorer, note)
