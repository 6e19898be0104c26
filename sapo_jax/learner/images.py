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


def features(params: Any, config: ModelConfig, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Features and grids of the images of all devices' rows: packed rows may be of any prompt."""
    images = batch.images
    learnt = isinstance(images, Images)
    own = vision.features(params, config, images) if learnt else images.features
    return tuple(collectives.all_gather(x, sharding.ROWS) for x in (own, images.grids))


def looked_at(params: Any, config: ModelConfig, batch: Batch) -> Batch:
    """A device's rows with what the tower of a policy makes of all images, if they see."""
    if batch.images is None:
        return batch
    return batch.replace(images=Seen(*features(params, config, batch)))


def sight(config: ModelConfig, batch: Batch) -> vision.Sight | None:
    """The images as the rows see them."""
    if batch.images is None:
        return None
    grids, rows = batch.images.grids, (batch.segments, batch.prefix)
    size = batch.images.features.shape[2]
    slots_BS = vision.slots(batch.tokens, config, grids, size, batch.prompt, *rows)
    return vision.see(batch.images, config, slots_BS, *rows)
