"""Tasks that see: the same pictures everywhere, answers that verify, loaders that refuse."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sapo_jax.tasks import Mixture, make
from sapo_jax.tasks.base import IMAGE
from sapo_jax.tasks.image_files import iou
from tests.tasks.test_tasks import HOSTILE

VARIANTS = [
    ("visual_sum", {}), ("visual_sum", {"terms": 2, "dot": 1}),
    ("visual_sum", {"terms": 9, "digits": 3, "modulus": 1001, "slip": 0.5}),
    ("count_shapes", {}), ("count_shapes", {"cells": 10, "kinds": 3, "colours": 4}),
    ("count_shapes", {"size": 24, "cells": 3, "kinds": 2, "colours": 1}),
    ("count_shapes", {"size": 24, "cells": 3, "slip": 0.5}),
    ("read_clock", {}), ("read_clock", {"step": 1, "size": 64}), ("read_clock", {"step": 60}),
    ("chart_value", {}), ("chart_value", {"bars": 8, "largest": 99, "size": 32}),
    ("maze", {}), ("maze", {"cells": 20, "walls": 40, "size": 96}),
]  # fmt: skip
NAMES = sorted({name for name, _ in VARIANTS})
DIGEST = """
import hashlib, io, json, sys
from PIL import Image
from sapo_jax.tasks import make
for name, options in json.loads(sys.argv[1]):
    for split in ("train", "test"):
        for i in range(3):
            e = make(name, **options).examples(split)[i]
            pixels = Image.open(io.BytesIO(e.images[0])).tobytes()
            print(name, e.id, e.prompt, e.answer, hashlib.md5(pixels).hexdigest())
"""


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_answers_verify_and_pictures_open(name, options):
    task = make(name, **options)
    for split in ("train", "test"):
        examples = task.examples(split)
        for i in range(12):
            example = examples[i]
            assert (example.id % 8 == 0) == (split == "test")
            assert example.prompt.count(IMAGE) == len(example.images) == task.max_images == 1
            assert len(example.prompt) <= task.max_prompt_chars
            assert len(example.demonstration) <= task.max_completion_chars
            text = example.prompt.replace(IMAGE, "") + example.demonstration
            assert set(text) <= set(task.alphabet)
            if not options.get("slip"):
                assert task.verify(example, example.demonstration) == 1
            picture = Image.open(io.BytesIO(example.images[0]))
            assert min(picture.size) >= 8
            assert len(picture.getcolors(picture.width * picture.height)) > 1 or "0" in text
            for hostile in HOSTILE.values():
                assert hostile.endswith(f"={example.answer}") or not task.verify(example, hostile)


def test_a_teacher_who_counts_wrong():
    """As often as asked, by a number that could be; the picture and the answer are the same."""
    right, slips = (make("count_shapes", size=16, cells=2, slip=p).examples("train")
                    for p in (0.0, 0.25))  # fmt: skip
    wrong = 0
    for i in range(400):
        assert slips[i].images == right[i].images
        assert slips[i].answer == right[i].answer == right[i].demonstration
        assert 0 <= int(slips[i].demonstration) <= 4
        wrong += slips[i].demonstration != slips[i].answer
    assert 70 < wrong < 130


def test_the_same_in_every_process():
    """Whatever the hash seed: ids, questions, answers and pixels."""
    texts = []
    for seed in "1", "77":
        command = [sys.executable, "-c", DIGEST, json.dumps(VARIANTS)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(set(texts[0].splitlines())) > 5.8 * len(VARIANTS)


def test_pictures_show_the_answer():
    """A chart's bars, a clock's minutes and a count follow from pixels alone."""
    task = make("chart_value", bars=2, largest=8, size=128)
    for i in range(20):
        example = task.examples("train")[i]
        pixels = np.asarray(Image.open(io.BytesIO(example.images[0])).convert("RGB")).astype(int)
        column = pixels[:112, 32 if "A" in example.prompt else 96]
        coloured = np.ptp(column, axis=-1) > 60
        assert round(coloured.sum() / 14) == int(example.answer)
    task = make("count_shapes", cells=3, kinds=1, colours=2, size=48)
    for i in range(20):
        example = task.examples("train")[i]
        pixels = np.asarray(Image.open(io.BytesIO(example.images[0])).convert("RGB")).astype(int)
        centres = pixels[8::16, 8::16].reshape(-1, 3)
        red, green = centres[:, 0] > 200, centres[:, 0] < 60
        red &= centres[:, 1] < 60
        found = (red if "red" in example.prompt else green).sum()
        assert found == int(example.answer)


def test_a_maze_takes_every_way_that_arrives():
    task = make("maze", cells=3, walls=0)
    example = next(e for e in map(task.examples("train").__getitem__, range(500))
                   if e.answer == "S../.G./...")  # fmt: skip
    ways = {"RD": 1, "DR": 1, "DDRU": 1, "D": 0, "RDR": 0, "LRRD": 0, "DDDRU": 0, "rd": 0, "": 0}
    assert {way: task.verify(example, way) for way in ways} == ways


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("count_shapes", {"cells": 1}, "cells"), ("count_shapes", {"colours": 5}, "colours"),
        ("read_clock", {"step": 7}, "step"), ("chart_value", {"bars": 9}, "bars"),
        ("maze", {"walls": 41}, "walls"), ("visual_sum", {"dot": 0}, "dot"),
        ("maze", {"size": 8}, "size"), ("grounding", {"threshold": 0.0}, "threshold"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, options, field):
    with pytest.raises(ValueError, match=f"{field} must be"):
        make(name, **options)


def test_a_mixture_has_the_most_images():
    assert Mixture({"a": make("chain_sum"), "b": make("maze")}).max_images == 1
    assert Mixture({"a": make("chain_sum")}).max_images == 0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 50), (3, 4, 5)).save(tmp_path / "images" / "1.png")

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


def test_mathvision(folder):
    row = {"id": "1", "image": "images/1.png", "level": 2}
    path = folder(
        row | {"question": "How many? <image1>", "options": ["3", "4"], "answer": "B"},
        row | {"question": "How long?", "options": [], "answer": "1/2"},
    )
    task = make("mathvision", test=path, template="{problem}")
    first, second = task.examples("test")
    assert first.prompt == f"How many? {IMAGE}\n(A) 3\n(B) 4"
    assert second.prompt == f"{IMAGE}How long?"
    assert (task.verify(first, r"\boxed{B}"), task.verify(first, r"\boxed{A}")) == (1, 0)
    assert task.verify(second, r"\boxed{\frac{1}{2}}") == 1
    assert Image.open(first.images[0]).size == (100, 50)


def test_grounding(folder):
    """Pixels become thousandths; the overlap is the reward, from the threshold on all of it."""
    path = folder(
        {"label": "the cat", "image": "images/1.png", "bbox": [10, 10, 60, 40]},
        {"label": "a dog", "image": "images/1.png", "bbox_2d": [0, 0, 500, 1000]},
    )
    task = make("grounding", train=path)
    cat, dog = task.examples("train")
    assert json.loads(cat.answer) == [{"bbox_2d": [100, 200, 600, 800], "label": "the cat"}]
    assert json.loads(dog.answer)[0]["bbox_2d"] == [0, 0, 500, 1000]
    assert task.verify(cat, f"```json\n{cat.answer}\n```") == 1
    assert task.verify(cat, '{"bbox_2d": [100, 200, 600, 500]}') == 1
    assert task.verify(cat, '{"bbox_2d": [100, 200, 200, 500]}') == pytest.approx(0.1)
    many = '[{"bbox_2d": [100, 200, 600, 800]}, {"bbox_2d": [0, 0, 9, 9]}]'
    for text in (many, '{"bbox_2d": [6, 2, 1, 8]}', '{"bbox_2d": [1e999, 2, 1, 8]}', "[1,2,3,4]"):
        assert task.verify(cat, text) == 0
    for hostile in HOSTILE.values():
        assert task.verify(cat, hostile) == 0
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)


BAD = {
    "no file": ({"image": "images/2.png"}, r"line 1: field 'image': 'images/2.png': must be"),
    "no field": ({}, "line 1: field 'image': None: must be a file in"),
    "marks": ({"image": "images/1.png", "question": "<image1><image2>"}, "2 places for 1 images"),
    "video": ({"image": "images/1.png", "video": "a.mp4"}, "videos are not supported: must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_refused(name, folder):
    row, message = BAD[name]
    path = folder({"question": "How?", "answer": "1"} | row)
    with pytest.raises(ValueError, match=message):
        make("mathvision", test=path).examples("test")
