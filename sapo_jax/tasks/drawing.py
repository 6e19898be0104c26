"""Pictures, drawn with Pillow; with glyphs of our own, which are the same on all machines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
COLOURS = {
    "red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 40),
}  # fmt: skip
GLYPHS = {  # rows of three dots
    "0": "####.##.##.####", "1": ".#.##..#..#.###", "2": "###..#####..###", "3": "###..####..####",
    "4": "#.##.####..#..#", "5": "####..###..####", "6": "####..####.####", "7": "###..#..#..#..#",
    "8": "####.#####.####", "9": "####.####..####", "+": "....#.###.#....", "-": "......###......",
    "A": ".#.#.#####.##.#", "B": "##.#.###.#.###.", "C": ".###..#..#...##", "D": "##.#.##.##.###.",
    "E": "####..##.#..###", "F": "####..##.#..#..", "G": ".###..#.##.#.##", "H": "#.##.####.##.##",
}  # fmt: skip


def canvas(width: int, height: int) -> tuple[Any, Any]:
    """A white picture, and what draws on it."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), WHITE)
    return picture, ImageDraw.Draw(picture)


def write(draw: Any, place: tuple[float, float], text: str, dot: int, colour=BLACK) -> None:
    """Characters of 3×5 dots, four dots apart, from a left upper corner on."""
    for n, character in enumerate(text):
        for i, mark in enumerate(GLYPHS[character]):
            if mark == "#":
                x, y = place[0] + (4 * n + i % 3) * dot, place[1] + i // 3 * dot
                draw.rectangle((x, y, x + dot - 1, y + dot - 1), fill=colour)


def shape(draw: Any, kind: str, box: Sequence[float], colour) -> None:
    """A circle, square or triangle that fills a box."""
    left, top, right, bottom = box
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def png(picture: Any) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
