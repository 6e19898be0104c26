"""The tower of Qwen3-VL: images to features, which the decoder takes in place of placeholders.

Images are patches of several grids one after the other (`types.Images`); what belongs to a patch
or to a token follows from the grids, so that all shapes are those of the padded arrays.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.model import attention, segments
from sapo_jax.model.attention import dense
from sapo_jax.model.config import ModelConfig, VisionConfig
from sapo_jax.model.images import Images, check, expand, process
from sapo_jax.model.params import UNCAST, all_gather
from sapo_jax.model.vision_table import vision_table
from sapo_jax.parallel import collectives

__all__ = [
    "Images", "Sight", "check", "expand", "features", "look", "positions", "process", "see",
    "slots",
]  # fmt: skip


class Sight(NamedTuple):
    """What the decoder takes of images.

    Attributes:
      features: f[1 + J, T, D] of T tokens: what stands for them, and what is added after layer j.
      slots: i32[B, S], which of the T a token of a row is; T for text.
      positions: i32[3, B, S], see `positions`.
    """

    features: jax.Array
    slots: jax.Array
    positions: jax.Array

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

    image: jax.Array  # i32[T], as all of them
    row: jax.Array
    column: jax.Array
    height: jax.Array
    width: jax.Array


def _places(grids_I3: jax.Array, size: int, vision: VisionConfig) -> Places:
    height_I, width_I = jnp.asarray(grids_I3)[:, 1:].T // vision.spatial_merge_size
    count_I = height_I * width_I
    ends_I, index_T = jnp.cumsum(count_I), jnp.arange(size)
    image_T = jnp.searchsorted(ends_I, index_T, side="right")
    start_T, height_T, width_T = (
        x.at[image_T].get(mode="fill", fill_value=1) for x in (ends_I - count_I, height_I, width_I)
    )
    within_T = index_T - start_T
    return Places(image_T, within_T // width_T, within_T % width_T, height_T, width_T)


def token_room(images: Images, config: ModelConfig) -> int:
    """T, the tokens that the arrays have room for."""
    return len(images.patches) // config.vision.merged


def slots(tokens_BS: jax.Array, config: ModelConfig, size: int) -> jax.Array:
    """Which token of the images each placeholder is, counted row by row; ``size`` for text."""
    seen_BS = jnp.asarray(tokens_BS) == config.vision.image_token_id
    count_BS = jnp.cumsum(seen_BS.reshape(-1), dtype=jnp.int32).reshape(seen_BS.shape)
    return jnp.where(seen_BS, count_BS - 1, size)


def _positions(slots_BS, config, grids_I3, size, segments_BS, prefix_BS=None) -> tuple:
    """(positions i32[3, B, S], how far each token moves those after it)."""
    places = _places(grids_I3, size, config.vision)
    last_T = (places.row == places.height - 1) & (places.column == places.width - 1)
    moves_T = jnp.where(last_T, jnp.maximum(places.height, places.width), 0)

    def at_slots(x_T, text):
        return x_T.at[slots_BS].get(mode="fill", fill_value=text)

    moves_BS = at_slots(moves_T, 1)
    before_BS = segments.positions(segments_BS, prefix_BS, moves_BS)
    axes = jnp.zeros_like(places.row), places.row, places.column
    return before_BS + jnp.stack([at_slots(x, 0) for x in axes]), moves_BS


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
    size = token_room(images, config)
    slots_BS = slots(tokens_BS, config, size)
    found, moves_BS = _positions(slots_BS, config, images.grids, size, jnp.ones_like(slots_BS))
    return found, jnp.sum(moves_BS - 1, -1)


def rotary(positions_3X: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """As `attention.rotary`; pairs 3i + 1 turn with height, 3i + 2 with width, others with time."""
    pair = np.arange(config.head_dim // 2)
    limit = 3 * np.array(config.vision.mrope_section)[pair % 3]
    per_pair = jnp.moveaxis(positions_3X, 0, -1)[..., np.where(pair < limit, pair % 3, 0)]
    return attention.turn(per_pair.astype(jnp.float32), config)


def _rope(row_N, column_N, vision: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) f32[N, d/2]: half of the pairs turn with rows, half with columns."""
    pairs = np.float32(vision.hidden_size // vision.num_heads // 2)
    inverse = 1 / np.float32(10_000) ** (np.arange(0, pairs, 2, dtype=np.float32) / pairs)
    angle = jnp.concatenate([x[:, None] * inverse for x in (row_N, column_N)], -1)
    return jnp.cos(angle), jnp.sin(angle)


def _resampled(table_PD: jax.Array, axes) -> jax.Array:
    """The square table of positions at each patch, bilinear with aligned corners, f32[N, D]."""
    side = math.isqrt(len(table_PD))
    taps = []
    for place, size in axes:
        source = place.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)
        low = jnp.floor(source).astype(jnp.int32)
        taps.append(((low, 1 - (source - low)), (jnp.minimum(low + 1, side - 1), source - low)))
    return sum(
        table_PD[row * side + column].astype(jnp.float32) * (row_share * share)[:, None]
        for row, row_share in taps[0]
        for column, share in taps[1]
    )


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


def _block(w: dict[str, jax.Array], x_ND, rope, segments_1N) -> jax.Array:
    h = collectives.copy_to_tensor(layer_norm(x_ND, w["norm1"], w["norm1_bias"]))
    q, k, v = jnp.moveaxis(dense(h, w["qkv"]) + w["qkv_bias"], 1, 0)
    q, k = attention.rotate(q, rope), attention.rotate(k, rope)
    out = attention.whole(q[None], k[None], v[None], segments_1N)[0]
    x_ND = x_ND + collectives.reduce_from_tensor(dense(out, w["proj"], 2)) + w["proj_bias"]
    return x_ND + _mlp(w, layer_norm(x_ND, w["norm2"], w["norm2_bias"]), True)


def _merge(w: dict[str, jax.Array], x_ND, merged: int) -> jax.Array:
    """[N, D] patches to [N/m², D'] tokens; the norm is over a patch, or over all of a token."""
    width = w["norm"].shape[-1]
    x = layer_norm(x_ND.reshape(-1, width), w["norm"], w["norm_bias"])
    return _mlp(w, x.reshape(-1, x_ND.shape[-1] * merged), False)


def features(params: Any, config: ModelConfig, images: Images) -> jax.Array:
    """What the tower makes of images, f[1 + J, T, D]: merged tokens, then deepstack features.

    Attention is among the patches of an image; the gradient computes each block again from its
    input. Pads come out as anything.
    """
    vision, dtype = config.vision, jnp.dtype(config.compute_dtype)
    specs, own, m = vision_table(config), params["vision"], config.vision.spatial_merge_size
    places = _places(images.grids, token_room(images, config), vision)
    places = jax.tree.map(lambda x: jnp.repeat(x, m * m), places)
    inner = jnp.arange(len(images.patches)) % (m * m)
    row_N, column_N = places.row * m + inner // m, places.column * m + inner % m
    segments_1N = jnp.where(places.image < len(images.grids), places.image + 1, 0)[None]
    rope = _rope(row_N, column_N, vision)

    def gathered(weights, specs):
        whole = all_gather(weights, specs, config)
        kept = {n for n, x in whole.items() if isinstance(x, dict) or n in UNCAST}
        return {n: x if n in kept else x.astype(dtype) for n, x in whole.items()}

    @jax.checkpoint
    def block(weights, x_ND):
        return _block(gathered(weights, specs["blocks"]), x_ND, rope, segments_1N)

    def step(carry, inputs):
        (x_ND, taps), (weights, at) = carry, inputs
        x_ND = block(weights, x_ND)
        return (x_ND, taps.at[at].set(x_ND)), None

    w = gathered(own, specs)
    axes = (row_N, places.height * m), (column_N, places.width * m)
    x_ND = dense(jnp.asarray(images.patches, dtype), w["patch"]) + w["patch_bias"]
    x_ND = x_ND + _resampled(w["positions"], axes).astype(dtype)
    indexes = list(vision.deepstack_visual_indexes)
    order = np.full(vision.depth, len(indexes))  # of the tap of each block; the last is none
    order[indexes] = range(len(indexes))
    taps = jnp.zeros((len(indexes) + 1, *x_ND.shape), dtype)
    (x_ND, taps), _ = jax.lax.scan(step, (x_ND, taps), (own["blocks"], order))
    found = [_merge(gathered(own["merger"], specs["merger"]), x_ND, vision.merged)]
    for j in range(len(indexes)):
        weights = {name: value[j] for name, value in own["deepstack"].items()}
        found.append(_merge(gathered(weights, specs["deepstack"]), taps[j], vision.merged))
    return jnp.stack(found)


def see(
    features_JTD: jax.Array,
    config: ModelConfig,
    grids_I3: jax.Array,
    slots_BS: jax.Array,
    segments_BS: jax.Array,
    prefix_BS: jax.Array | None = None,
) -> Sight:
    """Images as the decoder takes them, for rows that may be packed, see `segments`."""
    size = features_JTD.shape[1]
    found, _ = _positions(slots_BS, config, grids_I3, size, segments_BS, prefix_BS)
    return Sight(features_JTD, slots_BS, found)


def look(params: Any, config: ModelConfig, tokens_BS: jax.Array, images: Images) -> Sight:
    """The images of left-aligned rows as the decoder takes them.

    Raises:
      ValueError: see `check`.
    """
    check(tokens_BS, config, images)
    slots_BS = slots(tokens_BS, config, token_room(images, config))
    features_JTD = features(params, config, images)
    return see(features_JTD, config, images.grids, slots_BS, jnp.ones_like(slots_BS))
