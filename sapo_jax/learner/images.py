"""The images of a minibatch: whose they are, and what a policy's tower makes of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax.model import vision
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import collectives, sharding
from sapo_jax.types import Batch, Images, Seen


def with_prompt(batch: Batch) -> Batch:
    """The rows of all devices with `Batch.prompt`, if they see."""
    if batch.images is None or batch.prompt is not None:
        return batch
    rows, prompts = len(batch.tokens), len(batch.images.grids)
    prompt_B = jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), rows // prompts)
    return batch.replace(prompt=jnp.broadcast_to(prompt_B[:, None], batch.tokens.shape))


def look(params: Any, config: ModelConfig, batch: Batch) -> Seen | None:
    """What the tower of a policy makes of the images of all devices' rows, if they see.

    Of all, because packed rows may be of any prompt.
    """
    seen = batch.images
    if isinstance(seen, Images):
        seen = Seen(vision.features(params, config, seen), seen.grids)
    return jax.tree.map(lambda x: collectives.all_gather(x, sharding.ROWS), seen)
