"""What recorded models are shown: rows with placeholders, patches, pictures. Imports no torch."""

import zlib

import numpy as np

VOCAB, IMAGE = 61, 56
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 57, "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}  # fmt: skip
# Blocks (height, width) of the images of each row; widths of rows follow.
ROWS = {
    "dense": [[(2, 3), (3, 2)], [], [(1, 1)]],
    "tied_one_kv_head": [[(1, 2)], [(1, 2)], [(2, 1)]],
    "no_deepstack": [[], [(3, 3)]],
    "older_config": [[(4, 2), (1, 1), (1, 3)], [(2, 2)]],
    "text_alone": [[], []],
}
SOME = 9973  # of the numbers of an image, every 9973rd is recorded
LIMITS = [(65_536, 16_777_216), (1024, 4096)]  # pixels, as in the checkpoints; a few
SIZES = [
    (1, 1), (200, 1), (1, 200), (32, 32), (256, 256), (255, 257), (96, 64), (48, 80), (16, 3200),
    (4096, 4096), (4097, 4096), (5000, 7000), (16383, 1040), (20000, 100), (400, 80000),
    (337, 1009),
]  # fmt: skip


def rows(name, vision):
    """(tokens [B, S], bool[B, S] where there are any, grids [I, 3], patches) of a case."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    merge, blocks = vision.get("spatial_merge_size", 2), ROWS.get(name, ROWS["dense"])
    made = []
    for row in blocks:
        tokens = rng.integers(6, IMAGE, 3).tolist()
        for height, width in row:
            tokens += [58, *[IMAGE] * (height * width), 59, *rng.integers(6, IMAGE, 2)]
        made.append(tokens + rng.integers(6, IMAGE, 3).tolist())
    width = max(map(len, made))
    tokens, mask = np.full((len(made), width), 2), np.zeros((len(made), width), bool)
    for n, row in enumerate(made):
        tokens[n, : len(row)], mask[n, : len(row)] = row, True
    grids = np.array([(1, h * merge, w * merge) for row in blocks for h, w in row]).reshape(-1, 3)
    size = 3 * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2
    patches = rng.standard_normal((int(np.prod(grids, -1).sum()), size), np.float32)
    return tokens, mask, grids, patches


def pictures():
    """Images of Pillow: noise and gradients, in several sizes and modes."""
    from PIL import Image

    rng = np.random.default_rng(5)

    def noise(height, width, channels=3):
        return rng.integers(0, 256, (height, width, channels), np.uint8)

    row, column = np.mgrid[:64, :96]
    gradient = np.stack([row * 4, column * 2, row + column], -1).astype(np.uint8)
    found = {
        "gradient of 96×64": gradient,
        "multiples": noise(64, 128),
        "one pixel": noise(1, 1),
        "200:1": noise(2, 400),
        "1:200": noise(200, 1),
        "odd": noise(77, 131),
        "RGBA": noise(40, 50, 4),
    }
    found = {name: Image.fromarray(array) for name, array in found.items()}
    found["grey"] = found["odd"].convert("L")
    found["palette"] = found["odd"].quantize(16)
    found["transparent palette"] = found["odd"].quantize(16)
    found["transparent palette"].info["transparency"] = 3
    return found
