"""Questions about pictures from JSON lines: answers by value (MathVision), boxes by overlap."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from sapo_jax.tasks.base import IMAGE, Example, make_example
from sapo_jax.tasks.jsonl import FileTask
from sapo_jax.tasks.math_answer import MathAnswer

MARK = re.compile(r"<image\d*>")  # <image1> in MathVision


@dataclass(frozen=True)
class ImageFiles(FileTask):
    """What such tasks share: paths of pictures are relative to the file that names them.

    Args:
      train, test, completion_chars: see ``FileTask``.
      image_field: field with the path of a picture, or a list of such.
    """

    completion_chars: int = 2048
    image_field: str = "image"

    def _shown(self, example: Example, row: dict[str, Any], key: str) -> Example:
        """The example with its pictures, which stand in front where the text has no marks.

        Raises:
          ValueError: there is no such file, or videos, or not as many as the text has marks.
        """
        if "video" in row or "videos" in row:
            raise ValueError("field 'video': videos are not supported: must be images")
        found = row.get(self.image_field)
        paths = found if isinstance(found, list) else [found]
        here = pathlib.Path(key.rpartition("#")[0]).expanduser().parent
        for name in paths:
            if not isinstance(name, str) or not (here / name).is_file():
                raise ValueError(f"field {self.image_field!r}: {name!r}: must be a file in {here}")
        text = MARK.sub(IMAGE, example.prompt)
        if IMAGE not in text:
            text = IMAGE * len(paths) + text
        if (marks := text.count(IMAGE)) != len(paths):
            raise ValueError(f"{marks} places for {len(paths)} images: must be equal")
        images = [str(here / name) for name in paths]
        shows = "".join(paths)  # wherever the files lie
        return make_example(text, example.answer, "", images=images, shows=shows)

    @property
    def max_images(self) -> int:
        """The most of a prompt of the files."""
        every = (example for rows in self._splits.values() for example, _ in rows)
        return max((len(example.images) for example in every), default=1)


@dataclass(frozen=True)
class MathVision(ImageFiles, MathAnswer):
    """`MathAnswer` of problems with pictures, as MathVision (arXiv 2402.14804) has them.

    Args:
      train, test, completion_chars, image_field: see `ImageFiles`.
      problem_field, answer_field, template: see `MathAnswer`; behind a problem stand its choices,
        if the field ``options`` has some, and the answer is then a letter.
    """

    problem_field: str = "question"

    name: ClassVar[str] = "mathvision"

    def _parse(self, row: dict[str, Any], key: str) -> tuple[Example, None]:
        letters = (f"\n({chr(65 + i)}) {x}" for i, x in enumerate(row.get("options") or []))
        problem = row[self.problem_field] + "".join(letters)
        example, _ = super()._parse(row | {self.problem_field: problem}, key)
        return self._shown(example, row, key), None


@dataclass(frozen=True)
class Grounding(ImageFiles):
    """Where in a picture something is, as Qwen3-VL says it: ``{"bbox_2d": [x1, y1, x2, y2], …}``.

    Coordinates are thousandths of the picture's width and height. A line has the fields ``image``,
    ``label`` (what is looked for) and ``bbox``, in pixels, or ``bbox_2d``, in thousandths.

    Args:
      train, test, completion_chars, image_field: see `ImageFiles`.
      threshold: of the overlap from which on a box counts as right; a smaller one earns itself.
      template: the prompt; ``{label}`` stands for what is looked for.
    """

    threshold: float = 0.5
    template: str = "Locate {label}, report its bbox coordinates in JSON format."

    name: ClassVar[str] = "grounding"
    _fields: ClassVar[dict[str, Any]] = {"label": str}

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be a number in (0, 1], got {self.threshold!r}")

    def _parse(self, row: dict[str, Any], key: str) -> tuple[Example, None]:
        made = make_example(self.template.replace("{label}", row["label"]), "", "")
        example, box = self._shown(made, row, key), row.get("bbox_2d") or row.get("bbox")
        if not _is_box(box):
            raise ValueError(f"field 'bbox': {box!r}: must be [x1, y1, x2, y2], x1 < x2, y1 < y2")
        if "bbox_2d" not in row:
            from PIL import Image

            with Image.open(example.images[0]) as picture:
                box = [1000 * x / size for x, size in zip(box, picture.size * 2, strict=True)]
        answer = json.dumps([{"bbox_2d": [round(x) for x in box], "label": row["label"]}])
        return dataclasses.replace(example, answer=answer), None

    def verify(self, example: Example, completion: str) -> float:
        """The overlap (intersection over union) with the box of the completion, if it has one."""
        wanted = json.loads(example.answer)[0]["bbox_2d"]
        found = re.findall(r'"bbox_2d"\s*:\s*(\[[^\[\]]{1,200}\])', completion[-4096:])
        try:
            box = json.loads(found[0]) if len(found) == 1 else None
        except ValueError:
            return 0.0
        overlap = iou(box, wanted) if _is_box(box) else 0.0
        return 1.0 if overlap >= self.threshold else overlap


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
    finite = numbers and all(math.isfinite(x) and abs(x) < 1e9 for x in box)
    return finite and box[0] < box[2] and box[1] < box[3]


def iou(one: list[float], other: list[float]) -> float:
    """The intersection of two boxes, divided by their union."""
    common = [*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:])]
    areas = [max(0, right - x) * max(0, bottom - y) for x, y, right, bottom in (one, other, common)]
    return areas[2] / (areas[0] + areas[1] - areas[2])
