"""The tower of Qwen3-VL: images to features, which the decoder takes in place of placeholders.

Images are patches of several grids one after the other (`types.Images`), of all rows or of each of
P prompts; what belongs to a patch or to a token follows from the grids, so that all shapes are
those of the padded arrays. What the tower makes of them are `types.Seen`, once for all rows of a
prompt.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.model import attention, rope, segments
from sapo_jax.model.attention import dense
from sapo_jax.model.config import ModelConfig, VisionConfig
from sapo_jax.model.images import Room, check, expand, process
from sapo_jax.model.params import UNCAST, all_gather
from sapo_jax.model.vision_table import vision_table
from sapo_jax.parallel import collectives
from sapo_jax.types import Images, Seen

__all__ = ["Room", "Sight", "expand", "features", "look", "positions", "process", "see"]


class Sight(NamedTuple):
    """What the decoder takes of images.

    Attributes:
      features: f[1 + J, P·T, D]: what stands for tokens, and what is added after layer j.
      slots: i32[B, S], which of the P·T a token of a row is; P·T for text.
      positions: i32[3, B, S], see `positions`.
      delta: i32[B], of left-aligned rows likewise.
    """

    features: jax.Array
    slots: jax.Array
    positions: jax.Array
    delta: jax.Array

    def embed(self, x_BSD: jax.Array) -> jax.Array:
        """Embeddings, with features in place of placeholders."""
        seen_BS = self.slots < self.features.shape[1]
        return jnp.where(seen_BS[..., None], self._level(0, x_BSD.dtype), x_BSD)

    def add(self, x_BSD: jax.Array, layer: jax.Array | int) -> jax.Array:
        """The stream after a layer, with the features that are added there."""
        return jax.lax.cond(
            layer + 1 < len(self.features),
            lambda x: x + self._level(layer + 1, x.dtype), lambda x: x, x_BSD,
        )  # fmt: skip

    def _level(self, level, dtype):
        own_TD = jax.lax.dynamic_index_in_dim(self.features, level, keepdims=False)
        return own_TD.astype(dtype).at[self.slots].get(mode="fill", fill_value=0)


class Places(NamedTuple):
    """Where each of T tokens is: its image (I at pads), its place on the image's grid of tokens."""

    image: jax.Array  # i32[P, T], as all of them
    row: jax.Array
    column: jax.Array
    height: jax.Array
    width: jax.Array


def _places(grids_PI3: jax.Array, size: int, vision: VisionConfig) -> Places:
    def of_prompt(grids_I3):
        height_I, width_I = grids_I3[:, 1:].T // vision.spatial_merge_size
        count_I = height_I * width_I
        ends_I, index_T = jnp.cumsum(count_I), jnp.arange(size)
        image_T = jnp.searchsorted(ends_I, index_T, side="right")
        start_T, height_T, width_T = (
            x.at[image_T].get(mode="fill", fill_value=1)
            for x in (ends_I - count_I, height_I, width_I)
        )
        within_T = index_T - start_T
        return Places(image_T, within_T // width_T, within_T % width_T, height_T, width_T)

    return jax.vmap(of_prompt)(jnp.asarray(grids_PI3))


def _slots(tokens_BS, config, seen, prompt_BS, segments_BS, prefix_BS=None) -> jax.Array:
    """Which of P·T tokens of images each placeholder is, i32[B, S]; P·T for text.

    So are placeholders behind those of all images of the prompt: a policy may write them.
    """
    holds_BS = jnp.asarray(tokens_BS) == config.vision.image_token_id
    before_BS = segments.positions(segments_BS, prefix_BS, holds_BS.astype(jnp.int32))
    total_P = jnp.sum(jnp.prod(seen.grids, -1), -1) // config.vision.merged
    shows_BS = holds_BS & (before_BS < total_P[prompt_BS])
    p, _, size, _ = seen.features.shape
    return jnp.where(shows_BS, prompt_BS * size + before_BS, p * size)


def _sight(seen: Seen, config: ModelConfig, slots_BS, segments_BS, prefix_BS=None) -> Sight:
    """With the positions of rows that may be packed, see `positions`."""
    p, levels, size, width = seen.features.shape
    places = _places(seen.grids, size, config.vision)
    last = (places.row == places.height - 1) & (places.column == places.width - 1)
    moves_PT = jnp.where(last, jnp.maximum(places.height, places.width), 0)

    def at_slots(x_PT, text):
        return x_PT.reshape(-1).at[slots_BS].get(mode="fill", fill_value=text)

    moves_BS = at_slots(moves_PT, 1)
    before_BS = segments.positions(segments_BS, prefix_BS, moves_BS)
    axes = jnp.zeros_like(places.row), places.row, places.column
    found = before_BS + jnp.stack([at_slots(x, 0) for x in axes])
    flat = jnp.moveaxis(seen.features, 0, 1).reshape(levels, p * size, width)
    return Sight(flat, slots_BS, found, jnp.sum(moves_BS - 1, -1))


def _in_order(tokens_BS, config: ModelConfig, features_LTD, grids_I3) -> Sight:
    """The images of all rows, row by row: their slots are as if these were one."""
    seen, row = Seen(features_LTD[None], grids_I3[None]), jnp.reshape(tokens_BS, (1, -1))
    slots = _slots(row, config, seen, jnp.zeros_like(row), jnp.ones_like(row))
    slots_BS = slots.reshape(tokens_BS.shape)
    return _sight(seen, config, slots_BS, jnp.ones_like(slots_BS))


def positions(
    tokens_BS: jax.Array, config: ModelConfig, images: Images | None
) -> tuple[jax.Array, jax.Array]:
    """Positions in time, height and width (M-RoPE, arXiv 2409.12191) of left-aligned rows.

    A text token is one after the token before, on all axes; the tokens of an image lie at (0, row,
    column) from where it begins, and what follows it is max(height, width) further.

    Args:
      tokens_BS: i32[B, S], placeholders expanded.
      config: of a model that sees.
      images: all images of the rows, row by row; None for none.

    Returns:
      (i32[3, B, S], delta i32[B]: the token at index i after the row is at position i + delta).
    """
    if images is None:
        index_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        return jnp.stack([index_BS] * 3), jnp.zeros(len(tokens_BS), jnp.int32)
    nothing = jnp.zeros((1, len(images.patches) // config.vision.merged, 0))
    sight = _in_order(tokens_BS, config, nothing, images.grids)
    return sight.positions, sight.delta


def rotary(positions_3X: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """As `attention.rotary`; pairs 3i + 1 turn with height, 3i + 2 with width, others with time."""
    pair = np.arange(config.head_dim // 2)
    limit = 3 * np.array(config.vision.mrope_section)[pair % 3]
    per_pair = jnp.moveaxis(positions_3X, 0, -1)[..., np.where(pair < limit, pair % 3, 0)]
    return attention.turn(per_pair.astype(jnp.float32), config)


def _rope(row_X, column_X, vision: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) f32[..., d/2]: half of the pairs turn with rows, half with columns."""
    inverse, _ = rope.frequencies(vision.hidden_size // vision.num_heads // 2, 10_000.0, {})
    angle = jnp.concatenate([x[..., None] * inverse for x in (row_X, column_X)], -1)
    return jnp.cos(angle), jnp.sin(angle)


def _resampled(table_ND: jax.Array, axes) -> jax.Array:
    """The square table of positions at each patch, bilinear with aligned corners, f32[..., D]."""
    side = math.isqrt(len(table_ND))
    table_RCD = jnp.asarray(table_ND, jnp.float32).reshape(side, side, -1)
    found = [place * (side - 1) / jnp.maximum(size - 1, 1) for place, size in axes]
    at = partial(jax.scipy.ndimage.map_coordinates, coordinates=found, order=1, mode="nearest")
    return jax.vmap(at, -1, -1)(table_RCD)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalisation over the last axis, computed in f32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-6)
    return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _mlp(w: dict[str, jax.Array], x: jax.Array, approximate: bool) -> jax.Array:
    inner = dense(collectives.copy_to_tensor(x), w["fc1"]) + w["fc1_bias"]
    out = dense(jax.nn.gelu(inner, approximate=approximate), w["fc2"])
    return collectives.reduce_from_tensor(out) + w["fc2_bias"]


def _block(w: dict[str, jax.Array], x_PND, turns, segments_PN) -> jax.Array:
    h = collectives.copy_to_tensor(layer_norm(x_PND, w["norm1"], w["norm1_bias"]))
    q, k, v = jnp.moveaxis(dense(h, w["qkv"]) + w["qkv_bias"], 2, 0)
    q, k = attention.rotate(q, turns), attention.rotate(k, turns)
    out = attention.whole(q, k, v, segments_PN)
    x_PND = x_PND + collectives.reduce_from_tensor(dense(out, w["proj"], 2)) + w["proj_bias"]
    return x_PND + _mlp(w, layer_norm(x_PND, w["norm2"], w["norm2_bias"]), True)


def _merge(w: dict[str, jax.Array], x_PND, merged: int) -> jax.Array:
    """Patches to [P, N/m², D'] tokens; the norm is over a patch, or over all of a token."""
    p, width = len(x_PND), w["norm"].shape[-1]
    x = layer_norm(x_PND.reshape(p, -1, width), w["norm"], w["norm_bias"])
    return _mlp(w, x.reshape(p, -1, x_PND.shape[-1] * merged), False)


def features(
    params: Any, config: ModelConfig, images: Images, *, gathered: bool = False
) -> jax.Array:
    """What the tower makes of images, f[1 + J, T, D]: merged tokens, then deepstack features.

    Attention is among the patches of an image; the gradient computes each block again from its
    input. Pads come out as anything.

    Args:
      params: of the policy, "vision" at least.
      config: of a model that sees.
      images: all of some rows, or those of each of P prompts, which gives f[P, 1 + J, T, D].
      gathered: the parameters lie whole along `fsdp`, as the sampler's do.
    """
    if images.patches.ndim == 2:
        return features(params, config, jax.tree.map(lambda x: x[None], images))[0]
    vision, dtype = config.vision, jnp.dtype(config.compute_dtype)
    specs, own, m = vision_table(config), params["vision"], config.vision.spatial_merge_size
    places = _places(images.grids, images.patches.shape[1] // vision.merged, vision)
    places = jax.tree.map(lambda x: jnp.repeat(x, m * m, -1), places)
    inner = jnp.arange(images.patches.shape[1]) % (m * m)
    row_PN, column_PN = places.row * m + inner // m, places.column * m + inner % m
    count = images.grids.shape[1]
    segments_PN = jnp.where(places.image < count, places.image + 1, 0)
    turns = _rope(row_PN, column_PN, vision)

    def used(weights, specs):
        whole = weights if gathered else all_gather(weights, specs, config)
        uncast = {n for n, x in whole.items() if isinstance(x, dict) or n in UNCAST}
        return {n: x if n in uncast else x.astype(dtype) for n, x in whole.items()}

    @jax.checkpoint
    def block(weights, x_PND):
        return _block(used(weights, specs["blocks"]), x_PND, turns, segments_PN)

    def step(carry, inputs):
        (x_PND, taps), (weights, at) = carry, inputs
        x_PND = block(weights, x_PND)
        return (x_PND, taps.at[at].set(x_PND)), None

    w = used(own, specs)
    axes = (row_PN, places.height * m), (column_PN, places.width * m)
    x_PND = dense(jnp.asarray(images.patches, dtype), w["patch"]) + w["patch_bias"]
    x_PND = x_PND + _resampled(w["positions"], axes).astype(dtype)
    indexes = list(vision.deepstack_visual_indexes)
    order = np.full(vision.depth, len(indexes))  # of the tap of each block; the last is none
    order[indexes] = range(len(indexes))
    taps = jnp.zeros((len(indexes) + 1, *x_PND.shape), dtype)
    (x_PND, taps), _ = jax.lax.scan(step, (x_PND, taps), (own["blocks"], order))
    found = [_merge(used(own["merger"], specs["merger"]), x_PND, vision.merged)]
    for j in range(len(indexes)):
        weights = {name: value[j] for name, value in own["deepstack"].items()}
        found.append(_merge(used(weights, specs["deepstack"]), taps[j], vision.merged))
    return jnp.stack(found, 1)


def see(
    seen: Seen | None,
    config: ModelConfig,
    tokens_BS: jax.Array,
    prompt_BS: jax.Array,
    segments_BS: jax.Array,
    prefix_BS: jax.Array | None = None,
) -> Sight | None:
    """Images of P prompts as the decoder takes them, for rows that may be packed, see `segments`.

    ``prompt_BS``, or [B, 1], says whose images a token sees. None of text alone.
    """
    if seen is None:
        return None
    slots_BS = _slots(tokens_BS, config, seen, prompt_BS, segments_BS, prefix_BS)
    return _sight(seen, config, slots_BS, segments_BS, prefix_BS)


def look(params: Any, config: ModelConfig, tokens_BS: jax.Array, images: Images) -> Sight:
    """The images of left-aligned rows, row by row, as the decoder takes them.

    Raises:
      ValueError: see `check`.
    """
    check(tokens_BS, config, images)
    return _in_order(tokens_BS, config, features(params, config, images), images.grids)
