"""The host's part of images: pictures to patches, placeholders to as many tokens.

As the image processor of ``transformers`` (the one on Pillow) does it, to the bit.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax import cli
from sapo_jax.model.config import ModelConfig, VisionConfig
from sapo_jax.types import Images

LARGEST = 178_956_970  # pixels, from which on Pillow takes a file for a bomb
ASPECT = 200
SOURCES = "must be an image's path, bytes, uint8[height, width, channels] or a PIL image, no video"
LEVELS = ((np.arange(256) * (1 / 255)).astype(np.float32) - 0.5) / 0.5
BICUBIC = 3


def _vision(config: ModelConfig) -> VisionConfig:
    if config.vision is None:
        only = "must be 'qwen3_vl' or 'qwen3_vl_moe', or the prompts text alone"
        raise ValueError(f"images: model_type={config.model_type!r} sees none: {only}")
    return config.vision


def read(source: Any, name: str = "image") -> Any:
    """What a path, bytes, an array or Pillow's image show: RGB of Pillow, on white, upright.

    Raises:
      ValueError: with the name: it cannot be read, or is no single picture of an allowed size.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: {cli.missing(error)}", name=error.name) from None

    image = source
    try:
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3:
            image = Image.fromarray(source)
        elif isinstance(source, str | pathlib.Path | bytes):
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        elif not isinstance(source, Image.Image):
            raise TypeError(f"is {type(source).__name__}")
        low, high = sorted(image.size)
        for refused, wanted in (
            (not 1 <= low * high <= LARGEST, f"from 1 to {LARGEST} pixels"),
            (high > ASPECT * low, f"at most {ASPECT} times as long as wide"),
            (getattr(image, "n_frames", 1) > 1 and image.format != "MPO", "one frame, no video"),
        ):
            if refused:
                raise ValueError(f"{name}: {low}×{high} pixels: must be {wanted}")
        if image is not source:
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {error}: {SOURCES}") from None
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def thumbnail(source: Any, side: int = 192) -> str:
    """An image as a small PNG, a data URI for pages."""
    image, file = read(source), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


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


def _patches(image: Any, vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Patches f32[n, patch_dim], blocks of m × m adjacent, and their grid i32[1, 3]."""
    height, width = smart_resize(image.height, image.width, vision)
    pixels = np.asarray(image.resize((width, height), resample=BICUBIC))
    p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = height // p, width // p
    blocks = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(blocks[:, :, :, :, :, None], t, 5)
    return LEVELS[frames.reshape(rows * columns, -1)], np.array([[1, rows, columns]], np.int32)


def bucket(count: int, unit: int = 1) -> int:
    """The next of the sizes 1, 2, …, 8, 10, 12, 14, 16, 20, … times a unit."""
    units = -(-max(int(count), 1) // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


def process(
    images: Sequence[Any],
    config: ModelConfig,
    *,
    patches: int = 0,
    count: int = 0,
    name: str = "images",
) -> Images:
    """Images as the tower takes them, padded.

    Args:
      images: in the order of their placeholders, see `read`.
      config: of a model that sees.
      patches, count: sizes of the arrays; 0 for the next `bucket`.
      name: of the list, in messages.

    Raises:
      ValueError: see `read`; a model of text; or more than there is room for.
    """
    vision = _vision(config)
    parts = [_patches(read(x, f"{name}[{i}]"), vision) for i, x in enumerate(images)]
    size = sum(len(own) for own, _ in parts)
    patches = patches or bucket(size, vision.merged)
    count = count or bucket(len(parts))
    if size > patches or len(parts) > count:
        room = f"there is room for {count} with {patches} patches"
        raise ValueError(f"{name}: {len(parts)} with {size} patches: {room}")
    none = np.zeros((0, vision.patch_dim), np.float32), np.zeros((0, 3), np.int32)
    found = map(np.concatenate, zip(none, *parts, strict=True))
    return Images(*map(_padded, found, (patches, count)))


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@dataclasses.dataclass(frozen=True)
class Room:
    """What the images of a prompt have room in.

    Attributes:
      config: of a model that sees.
      tokens: T, all images of a prompt together.
      count: I, images of a prompt.
    """

    config: ModelConfig
    tokens: int
    count: int

    def tokens_of(self, images: Sequence[Any], name: str = "images") -> int:
        """Tokens that the images are.

        Raises:
          ValueError: see `read`.
        """
        vision = _vision(self.config)
        pictures = (read(x, f"{name}[{i}]") for i, x in enumerate(images))
        areas = (math.prod(smart_resize(x.height, x.width, vision)) for x in pictures)
        return sum(area // (vision.patch_size**2 * vision.merged) for area in areas)

    def expand(
        self, tokens: Sequence[int], images: Sequence[Any], name: str
    ) -> tuple[list[int], Images]:
        """A prompt as `expand`, and its images as `process`, in arrays of this size.

        Raises:
          ValueError: with the prompt's name, see there.
        """
        room = {"patches": self.tokens * _vision(self.config).merged, "count": self.count}
        found = process(images, self.config, name=f"{name}: images", **room)
        return expand(tokens, found, self.config, f"{name}: prompt: "), found


def by_row(images: Images, tokens_BS: np.ndarray, config: ModelConfig) -> Images:
    """Images of all rows, row by row, as those of each row, in arrays of one size.

    Raises:
      ValueError: see `check`, or a row has a part of an image.
    """
    check(tokens_BS, config, images)
    merged, held_B = config.vision.merged, (tokens_BS == config.vision.image_token_id).sum(-1)
    stop_B = np.cumsum(held_B)  # where the tokens of each row end, and those of each image
    ends = np.append(0, np.cumsum(token_counts(images, config)))
    count_B = np.searchsorted(ends[1:], stop_B, side="right")
    for row in np.flatnonzero(ends[count_B] != stop_B):
        size = ends[count_B[row] + 1] - (stop_B - held_B)[row]
        counts = f"{held_B[row]} placeholders for {size} tokens of its images"
        raise ValueError(f"row {row} has {counts}: must be equal")

    def stacked(x, stops, unit=1):
        rows = np.split(np.asarray(x), stops)[:-1]
        size = bucket(max(map(len, rows)), unit)
        return np.stack([_padded(own, size) for own in rows])

    patches = stacked(images.patches, stop_B * merged, merged)
    return Images(patches, stacked(images.grids, count_B))


def token_counts(images: Images, config: ModelConfig) -> list[int]:
    """How many tokens each image is."""
    counts = np.prod(images.grids, -1) // _vision(config).merged
    return [n for n in counts.ravel().tolist() if n]


def expand(tokens: Sequence[int], images: Images, config: ModelConfig, name: str = "") -> list[int]:
    """A prompt with each placeholder repeated once for each token of its image.

    Refusals begin with ``name``.

    Raises:
      ValueError: more placeholders than images, or fewer; or one of a video.
    """
    counts, image = token_counts(images, config), config.vision.image_token_id
    _check(np.array(tokens), config, len(counts), "images", name)
    own = iter(counts)
    return [t for one in tokens for t in [one] * (next(own) if one == image else 1)]


def check(tokens_BS: jax.Array, config: ModelConfig, images: Images) -> None:
    """Refuse expanded placeholders that are not as many as the images' tokens, where known.

    Raises:
      ValueError: that, a placeholder of a video, or a model of text.
    """
    _vision(config)
    if not any(isinstance(x, jax.core.Tracer) for x in (tokens_BS, images.grids)):
        counts = token_counts(images, config)
        _check(np.asarray(tokens_BS), config, sum(counts), f"tokens of {len(counts)} images")


def _check(tokens: np.ndarray, config: ModelConfig, wanted: int, what: str, name="") -> None:
    image, video = config.vision.image_token_id, config.vision.video_token_id
    if (found := int(np.sum(tokens == image))) != wanted:
        counts = f"{found} placeholders (token {image}) for {wanted} {what}"
        raise ValueError(f"{name}{counts}: must be equal")
    if np.any(tokens == video):
        raise ValueError(f"{name}token {video}: videos are not supported: must be images")
