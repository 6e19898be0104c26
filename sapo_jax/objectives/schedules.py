"""Hyperparameters that change over a run: from an objective's own values to those at its end."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax.objectives.presets import Objective, Switch

SHAPES = ("constant", "linear", "cosine")


@struct.dataclass
class Schedule:
    """What an objective becomes; all of it is data, so that runs with others share a program.

    Attributes:
      end: the objective in the last iteration.
      shape: which of SHAPES leads there.
      iterations: of the run.
    """

    end: Objective | Switch
    shape: jax.Array | float = 0.0
    iterations: jax.Array | float = 1.0

    def at(self, start: Any, iteration: Any, xp: ModuleType = jnp) -> Any:
        """The objective of an iteration, counted from 0, that was ``start`` in the first.

        A value is start + share·(end − start), with progress p from 0 to 1 in equal steps and
        share 0 (constant), p (linear), (1 − cos πp)/2 (cosine).
        """
        p = xp.clip(iteration / xp.maximum(self.iterations - 1, 1), 0, 1)
        share = xp.stack([0 * p, p, (1 - xp.cos(xp.pi * p)) / 2])[xp.int32(self.shape)]
        return jax.tree.map(
            lambda a, b: xp.where(a == b, a, a + share * (b - a)), start, self.end
        )  # exactly a where nothing changes, ∞ too
