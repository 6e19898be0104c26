"""Rows as minibatches, packed, with the log-probabilities that their updates need."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from sapo_jax import learner
from sapo_jax.training.engine import Bundle
from sapo_jax.types import Batch

Lengths = tuple[np.ndarray, np.ndarray]  # tokens of a row's prompt and of its completion, i[B]


def layouts_of(engine: Any, lengths: list[Lengths], parts: int) -> list[Any]:
    """Where the rows of each minibatch are packed, one for all of the engine's runs, or None."""
    run = engine.runs[0]
    if run.packing is None:
        return [None] * parts
    width = run.width + run.max_new_tokens
    split = [tuple(np.split(x, parts) for x in own) for own in lengths]
    return [
        engine.join([learner.plan(p[i], c[i], width, run.packing) for p, c in split])
        for i in range(parts)
    ]


def packed(engine: Any, batches: tuple[Batch, ...], layouts: list[Any]) -> tuple[Batch, ...]:
    """Minibatches by their layouts."""
    if layouts[0] is None:
        return batches
    pack = partial(engine.call, learner.pack, mesh=engine.runs[0].mesh)
    return tuple(map(pack, batches, layouts))


def scored(bundle: Bundle, batch: Batch, lengths: list[Lengths]) -> tuple[Batch, ...]:
    """Minibatches with the log-probabilities, and the routing, that their update needs.

    Of all prompts, also where more were drawn than are learnt from: that is not known yet.
    """
    engine, run, params = bundle.engine, bundle.engine.runs[0], bundle.state.params
    hp, sizes, frozen = engine.hp, run.config.batch, bundle.frozen
    replays = hp.static.routing_replay == "R2"
    recomputes = run.config.learner.old_logp == "recompute"
    parts = sizes.minibatches * sizes.oversample
    minibatches = engine.call(learner.split_rows, batch, parts=parts, mesh=run.mesh)
    if not (replays or recomputes or bundle.reference is not None):
        return minibatches

    def with_logp(batch, layout):
        (rows,), found = packed(engine, (batch,), [layout]), {}
        if replays:
            scored = engine.call(learner.score_routing, params, rows, hp, frozen)
            found["old_logp"], found["routing"] = scored
        elif recomputes:
            found["old_logp"] = engine.call(learner.score, params, rows, hp, frozen)
        if bundle.reference is not None:
            shape = dataclasses.replace(run.model, lora_targets=())  # the base without adapters
            own = hp.replace(routing_replay="none", model=shape)
            found["ref_logp"] = engine.call(learner.score, bundle.reference, rows, own, frozen)
        if layout is not None:
            found = engine.call(learner.unpack, found, layout, mesh=run.mesh)
        return batch.replace(**found)

    layouts = layouts_of(engine, lengths, parts)
    return tuple(map(with_logp, minibatches, layouts))
