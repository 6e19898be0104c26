"""The images of prompts: looked at once a rollout, and seen by all completions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax.model import vision
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.images import by_row, check
from sapo_jax.parallel import runs, sharding
from sapo_jax.sampler import weights
from sapo_jax.sampler.results import ROWS
from sapo_jax.types import Images, Prompts, Seen


def seen(params: Any, config: ModelConfig, prompts: Prompts, mesh: Mesh | None) -> Prompts:
    """The prompts with what the sampler's tower makes of their images, once for all completions.

    Raises:
      ValueError: there are not as many placeholders as tokens of images, or see `images.check`.
    """
    images = prompts.images
    if not isinstance(images, Images):
        return prompts
    check(prompts.tokens, config, images)
    if images.patches.ndim == 2:
        images = by_row(images, np.asarray(prompts.tokens), config)
    tower, images = {"vision": params["vision"]}, sharding.place(images, mesh, ROWS)
    return prompts.replace(images=see(tower, config, images, mesh=mesh))


@partial(jax.jit, static_argnames=("config", "mesh"))
def see(params, config, images, *, mesh=None) -> Seen:
    """What the tower makes of the images of each prompt; "vision" alone of the parameters."""

    def local(params, images):
        own = runs.of_device(params)
        return Seen(vision.features(own, config, images, gathered=True), images.grids)

    specs = {"vision": weights.partition_specs(config)["vision"]}
    in_specs = (sharding.by_run(specs, mesh), ROWS)
    return sharding.shard_map(local, mesh, in_specs, ROWS)(params, images)


def sight(config, seen, tokens_BN, group=1) -> vision.Sight | None:
    """The images as rows see them, ``group`` of each prompt; None where there are none."""
    prompt_B1 = jnp.arange(len(tokens_BN))[:, None] // group
    return vision.see(seen, config, tokens_BN, prompt_B1, jnp.ones_like(tokens_BN))
