"""Groups that go on in the next iteration, since config.sampler.budget has ended a rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import sampler
from sapo_jax.parallel import sharding
from sapo_jax.training.settings import Settings
from sapo_jax.types import GOES_ON, Prompts, Rollout

OLDEST = 16  # iterations; what is older counts as of this age


@dataclasses.dataclass
class Carry:
    """What a run's next rollout begins with; each rollout replaces it.

    Attributes:
      begun: the completions, on the device.
      places: of each place in the batch, what is known of its group that goes on: the iteration and
        occurrence that its noise goes by, as what number the stream has read its example, and how
        many tokens its completions have; None where a new one is drawn.
    """

    begun: sampler.Begun
    places: list[dict[str, Any] | None]

    @property
    def tokens(self) -> np.ndarray:
        """How many each group has, i[P]."""
        return np.array([sum(place["tokens"]) if place else 0 for place in self.places])

    def drawn(self, prompts: Prompts, numbers: Sequence[int], iteration: int) -> Prompts:
        """The prompts of a batch with what their noise goes by; remembers it for new ones."""
        new = [p for p, place in enumerate(self.places) if place is None]
        fresh = sampler.with_occurrence(jax.tree.map(lambda x: x[np.array(new, int)], prompts))
        for p, occurrence in zip(new, fresh.occurrence.tolist(), strict=True):
            found = {"iteration": iteration, "occurrence": occurrence, "read": numbers[p]}
            self.places[p] = found | {"tokens": [0]}
        columns = ([p[k] for p in self.places] for k in ("occurrence", "iteration"))
        occurrence_P, iteration_P = (np.array(column, np.int32) for column in columns)
        return prompts.replace(occurrence=occurrence_P, iteration=iteration_P)

    def leave(self, begun: sampler.Begun, length_B: np.ndarray, finished_B: np.ndarray) -> None:
        """Behind a rollout: the groups with completions that go on."""
        self.begun = begun
        groups = (x.reshape(len(self.places), -1) for x in (length_B, finished_B))
        self.places = [
            place | {"tokens": length_G.tolist()} if (finished_G == GOES_ON).any() else None
            for place, length_G, finished_G in zip(self.places, *groups, strict=True)
        ]

    def copy(self) -> Carry:
        """The same, whatever becomes of this one."""
        return Carry(self.begun, list(self.places))


def _none(run: Settings) -> sampler.Begun:
    group_size = run.config.batch.group_size
    return sampler.none_begun(run.model, run.drawn, group_size, run.max_new_tokens)


def first(engine: Any, stored: Any = None, places: Sequence[Mapping] | None = None) -> Carry | None:
    """What the first rollout of an engine's run begins with, or the first one behind a checkpoint.

    None without a budget.
    """
    run = engine.runs[0]
    if not run.config.sampler.budget:
        return None
    begun = sampler.Begun(**stored) if stored else engine.place([_none(run)])
    places = places or [None] * len(begun.tokens)
    return Carry(sharding.place(begun, run.sampler_mesh), list(places))


def abstract(run: Settings) -> sampler.Begun:
    """The abstract values of what a rollout begins with."""
    return jax.eval_shape(partial(_none, run))


def done(run: Settings, finished_B: np.ndarray) -> np.ndarray:
    """Rows of groups without a completion that goes on, bool[B]."""
    size = run.config.batch.group_size
    if not run.config.sampler.budget:
        return np.ones(len(finished_B), bool)
    return np.repeat((finished_B != GOES_ON).reshape(-1, size).all(-1), size)


@jax.jit
def lags_of(rollout: Rollout, policy_step: jax.Array) -> jax.Array:
    """Tokens of each row by how many iterations older their policies are, i32[B, OLDEST + 1]."""
    lag_BS = jnp.minimum(policy_step - rollout.token_step, OLDEST)
    lag_BS = jnp.where(rollout.mask, lag_BS, -1)
    return jnp.stack([jnp.sum(lag_BS == lag, -1) for lag in range(OLDEST + 1)], -1)
