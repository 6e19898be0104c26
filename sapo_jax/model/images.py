"""The host's part of images: files and pictures to patches, placeholders to as many tokens.

As the image processor of ``transformers`` (the one on Pillow) does it, to the bit.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.model.config import ModelConfig, VisionConfig
from sapo_jax.types import Images

LARGEST = 178_956_970  # pixels of a file, from which on Pillow calls it a bomb
ASPECT = 200
SOURCES = "must be an image's path, bytes, uint8[height, width, channels] or a PIL image, no video"


def _vision(config: ModelConfig) -> VisionConfig:
    if config.vision is None:
        raise ValueError(
            f"images: a model of model_type={config.model_type!r} sees none: must be 'qwen3_vl' or "
            "'qwen3_vl_moe', or the prompts text alone"
        )
    return config.vision


def read(source: Any, name: str = "image") -> Any:
    """A picture of anything that holds one, as an RGB image of Pillow on a white ground.

    Raises:
      ValueError: with the name: nothing is there, it cannot be read, or it is no single picture of
        an allowed size.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ValueError(
            f"{name}: reading images takes Pillow: pip install 'sapo_jax[vision]'"
        ) from None

    image = source
    try:
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3:
            image = Image.fromarray(source)
        elif isinstance(source, str | pathlib.Path | bytes):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        elif not isinstance(source, Image.Image):
            raise ValueError(f"{name} is {type(source).__name__}: {SOURCES}")
        low, high = sorted(image.size)
        if low < 1 or low * high > LARGEST:
            raise ValueError(f"{name}: {low}×{high} pixels: must be from 1 to {LARGEST} pixels")
        if high > ASPECT * low:
            raise ValueError(f"{name}: {low}×{high} pixels: at most {ASPECT} times as long as wide")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{name}: {image.n_frames} frames: must be one, no video")
        if image is not source:
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {error}: {SOURCES}") from None
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def smart_resize(height: int, width: int, vision: VisionConfig) -> tuple[int, int]:
    """(height, width) near those given: multiples of patch·m, with an area within the limits."""
    unit = vision.patch_size * vision.spatial_merge_size
    near = round(height / unit) * unit, round(width / unit) * unit
    if math.prod(near) > vision.max_pixels:
        shrink = math.sqrt(height * width / vision.max_pixels)
        return tuple(max(unit, math.floor(x / shrink / unit) * unit) for x in (height, width))
    if math.prod(near) < vision.min_pixels:
        grow = math.sqrt(vision.min_pixels / (height * width))
        return tuple(math.ceil(x * grow / unit) * unit for x in (height, width))
    return near


def patches_of(image: Any, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An RGB image as patches f32[n, patch_dim], blocks of m × m adjacent, and its grid."""
    height, width = smart_resize(image.height, image.width, vision)
    resized = np.asarray(image.resize((width, height), resample=3))  # bicubic, in uint8
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = height // p, width // p
    blocks = resized.reshape(rows // m, m, p, columns // m, m, p, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = np.broadcast_to(blocks, (*blocks.shape[:5], t, p, p))
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    return ((levels - 0.5) / 0.5)[frames.reshape(rows * columns, -1)], (1, rows, columns)


def bucket(count: int, least: int = 1) -> int:
    """The next of the sizes 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … times ``least``."""
    units = -(-max(count, 1) // least)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * least


def process(
    images: Sequence[Any], config: ModelConfig, *, patches: int | None = None,
    count: int | None = None, names: Sequence[str] | None = None,
) -> Images:  # fmt: skip
    """Images as the tower takes them, padded.

    Args:
      images: in the order of their placeholders: what `read` reads.
      config: of a model that sees.
      patches, count: sizes of the arrays; None for the next of a few (`bucket`).
      names: of the images, for messages.

    Raises:
      ValueError: see `read`; a model of text; or more than there is room for.
    """
    vision = _vision(config)
    names = names or [f"images[{i}]" for i in range(len(images))]
    pictures = [read(image, name) for image, name in zip(images, names, strict=True)]
    parts = [patches_of(picture, vision) for picture in pictures]
    sizes = sum(len(own) for own, _ in parts), len(parts)
    room = patches or bucket(sizes[0], vision.merged), count or bucket(sizes[1])
    for what, size, limit in zip(("patches", "images"), sizes, room, strict=True):
        if size > limit:
            raise ValueError(f"{names[0]}, …: {size} {what}: there is room for {limit}")
    if room[0] % vision.merged:
        raise ValueError(f"patches={room[0]}: must be a multiple of {vision.merged}")
    padded = np.zeros((room[0], vision.patch_dim), np.float32)
    grids = np.zeros((room[1], 3), np.int32)
    if parts:
        padded[: sizes[0]] = np.concatenate([own for own, _ in parts])
        grids[: sizes[1]] = [grid for _, grid in parts]
    return Images(padded, grids)


def token_counts(grids_I3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """How many tokens each image is, i32[I]."""
    return np.prod(np.asarray(grids_I3), -1) // vision.merged


def expand(tokens: Sequence[int], grids_I3: np.ndarray, config: ModelConfig) -> list[int]:
    """A prompt with each placeholder repeated once a token of its image.

    Raises:
      ValueError: more placeholders than images, or fewer; or one of a video.
    """
    vision = _vision(config)
    counts = token_counts(grids_I3, vision)
    counts = counts[counts > 0].tolist()
    found = sum(token == vision.image_token_id for token in tokens)
    if found != len(counts):
        raise ValueError(f"{found} image placeholders for {len(counts)} images: must be as many")
    if vision.video_token_id in tokens:
        raise ValueError(f"token {vision.video_token_id}: videos are not supported: images only")
    own = iter(counts)
    return [
        token
        for one in tokens
        for token in [one] * (next(own) if one == vision.image_token_id else 1)
    ]


def check(tokens_BS: jax.Array, config: ModelConfig, images: Images) -> None:
    """Refuse expanded placeholders that are not as many as the images' tokens, where known.

    Raises:
      ValueError: that, a placeholder of a video, or a model of text.
    """
    vision = _vision(config)
    if isinstance(tokens_BS, jax.core.Tracer) or isinstance(images.grids, jax.core.Tracer):
        return
    tokens_BS = np.asarray(tokens_BS)
    found, wanted = np.sum(tokens_BS == vision.image_token_id), token_counts(images.grids, vision)
    if found != wanted.sum():
        raise ValueError(
            f"images: {found} placeholders (token {vision.image_token_id}) for "
            f"{np.sum(wanted > 0)} images of {wanted.sum()} tokens: must be as many"
        )
    if np.any(tokens_BS == vision.video_token_id):
        raise ValueError(f"token {vision.video_token_id}: videos are not supported: images only")
