"""Pictures to patches as the processor of transformers has them, and what is refused."""

import io
import json
import zlib

import jax
import numpy as np
import pytest

from sapo_jax import model
from sapo_jax.model import images, vision
from sapo_jax.model.config import VisionConfig
from tests.model.test_vision import ORACLES
from tests.oracles import seen

Image = pytest.importorskip("PIL.Image")
RECORDED = json.loads((ORACLES / "images.json").read_text())


def sees(least, most):
    tower = VisionConfig(
        2, 32, 48, 4, mrope_section=(2, 3, 3), min_pixels=least, max_pixels=most, **seen.TOKENS
    )
    return model.make("nano", vocab_size=seen.VOCAB, model_type="qwen3_vl", vision=tower)


CONFIG = sees(1024, 4096)


@pytest.mark.parametrize("limits", seen.LIMITS)
def test_patches_are_those_of_transformers(limits):
    """To the bit (its processor on Pillow): order of patches, grids, alpha, palettes, limits."""
    config, pictures = sees(*limits), seen.pictures()
    found = vision.process(list(pictures.values()), config)
    assert found.patches.dtype == np.float32
    ends = np.cumsum(np.prod(found.grids, -1))
    assert not found.patches[ends[len(pictures) - 1] :].any()
    parts = np.split(found.patches, ends)
    for name, grid, patches in zip(pictures, found.grids, parts, strict=False):
        recorded = RECORDED[f"{name} {limits}"]
        assert grid.tolist() == recorded["grid"], name
        np.testing.assert_array_equal(
            patches.reshape(-1)[:: seen.SOME], np.float32(recorded["values"])
        )
        assert zlib.crc32(np.ascontiguousarray(patches).tobytes()) == recorded["checksum"], name


def test_sizes_are_those_of_transformers():
    for size, wanted in RECORDED["sizes"]:
        assert list(images.smart_resize(*size, sees(*seen.LIMITS[0]).vision)) == wanted, size


def test_buckets_are_few_and_close():
    """A few shapes for all sizes, none wasting more than a quarter; asked-for sizes are kept."""
    sizes = [images.bucket(n, 4) for n in range(1, 5000)]
    assert all(n <= size < 1.26 * n + 4 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 50
    found = vision.process([seen.pictures()["multiples"]], CONFIG, patches=64, count=5)
    assert found.patches.shape == (64, CONFIG.vision.patch_dim)
    assert found.grids.tolist() == [[1, 2, 4], *[[0, 0, 0]] * 4]
    none = vision.process([], CONFIG)
    assert not none.grids.any()


def test_files_bytes_and_arrays_are_read_alike(tmp_path):
    """A photo that says that it lies on its side is turned, as by transformers' loader."""
    picture = seen.pictures()["odd"]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "x.png")
    sources = [
        picture, np.asarray(picture), tmp_path / "x.png", str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(), tmp_path / "turned.png",
    ]  # fmt: skip
    found = vision.process(sources, CONFIG)
    count = int(np.prod(found.grids[0]))
    parts = found.patches[: 6 * count].reshape(6, count, -1)
    np.testing.assert_array_equal(parts, np.broadcast_to(parts[:1], parts.shape))


def test_placeholders_are_expanded():
    found = vision.process(
        [np.zeros((32, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)], CONFIG
    )
    tokens = [7, 58, 56, 59, 8, 58, 56, 59]
    wanted = [7, 58, 56, 56, 59, 8, 58, 56, 56, 56, 56, 59]
    assert vision.expand(tokens, found, CONFIG) == wanted


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def film():
    frames = [seen.pictures()[name] for name in ("odd", "grey")]
    return encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])


BAD = {
    "missing": (
        lambda: "no/such.png",
        r"images\[1\]: .*No such file.*no/such.png.*an image's path",
    ),
    "corrupt": (lambda: b"\x89PNG\r\n\x1a\nxx", r"images\[1\]: cannot identify image file"),
    "cut off": (lambda: encoded(seen.pictures()["odd"], format="PNG")[:2000], "truncated"),
    "text": (lambda: b"hello", "cannot identify image file .* no video"),
    "narrow": (lambda: np.zeros((1, 201, 3), np.uint8), "1×201 pixels: must be at most 200 times"),
    "large": (lambda: Image.new("1", (20000, 9000)), "9000×20000 .* from 1 to 178956970 pixels"),
    "film": (film, "must be one frame, no video"),
    "shape": (
        lambda: np.zeros((8, 8), np.uint8),
        r"images\[1\]: is ndarray: must be an image's path",
    ),
    "other": (lambda: 7, r"images\[1\]: is int: must be an image's path, bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_seen_is_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        vision.process([seen.pictures()["odd"], make()], CONFIG)


def test_what_does_not_fit_the_model_is_refused():
    """A model of text, wrong numbers of placeholders, videos, too little room."""
    picture = seen.pictures()["one pixel"]
    found = vision.process([picture] * 2, CONFIG)
    text = model.make("nano", vocab_size=seen.VOCAB)
    weights = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), model.params.abstract(CONFIG))
    with pytest.raises(ValueError, match="model_type='qwen3' sees none: must be 'qwen3_vl' or"):
        vision.process([picture], text)
    with pytest.raises(ValueError, match="model_type='qwen3' sees none"):
        model.logits(weights, text, np.zeros((1, 3), np.int32), images=found)
    for count in (1, 3):
        tokens = np.array([[7] + [seen.IMAGE] * count])
        with pytest.raises(ValueError, match=f"{count} placeholders .* for 2 tokens of 2 images"):
            model.logits(weights, CONFIG, tokens, images=found)
        with pytest.raises(ValueError, match=f"{count} placeholders .* for 2 images"):
            vision.expand(tokens[0].tolist(), found, CONFIG)
    film = np.array([[seen.IMAGE, seen.IMAGE, 57]])
    with pytest.raises(ValueError, match="token 57: videos are not supported"):
        model.logits(weights, CONFIG, film, images=found)
    with pytest.raises(ValueError, match="token 57: videos are not supported"):
        vision.expand(film[0].tolist(), found, CONFIG)
    with pytest.raises(ValueError, match="images: 2 with 8 patches: there is room for 2 with 4"):
        vision.process([picture] * 2, CONFIG, patches=4)
    with pytest.raises(ValueError, match="there is room for 1 with 8 patches"):
        vision.process([picture] * 2, CONFIG, count=1)
