"""Questions about pictures that are drawn for them, from easy to hard by the options of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sapo_jax.tasks import base, drawing
from sapo_jax.tasks.base import IMAGE, Example, draw, make_example
from sapo_jax.tasks.chain_sum import ChainSum

Bounds = dict[str, tuple[int, int]]
MOVES = "DLRU"
KINDS = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Visual(base.Generated):
    """What such tasks share: an answer that is the whole completion.

    Args:
      size: pixels of the picture's side.

    Raises:
      ValueError: an option is out of its range.
    """

    size: int = 256

    max_images: ClassVar[int] = 1
    max_prompt_chars: ClassVar[int] = 32
    max_completion_chars: ClassVar[int] = 8
    bounds: ClassVar[Bounds] = {}  # of the other options

    def __post_init__(self):
        for field, (low, high) in {"size": (16, 4096), **self.bounds}.items():
            base.check_option(field, getattr(self, field), low, high)

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff it is the answer, character for character."""
        return float(completion == example.answer)


def _example(picture, prompt: str, answer: str, way: str, shows: str) -> Example:
    images = [drawing.png(picture)]
    return make_example(IMAGE + prompt, answer, way, images=images, shows=shows)


@dataclass(frozen=True)
class VisualSum(ChainSum):
    """`ChainSum` whose problem is a picture: of ``7+5-3`` with ``7+5=12;12-3=9`` as its answer.

    Args:
      terms, digits, modulus, slip: see `ChainSum`; more of the first two are harder.
      dot: pixels of the dots of which a character has 3×5, and 4×8 with what is around it.
    """

    dot: int = 8

    name: ClassVar[str] = "visual_sum"
    max_images: ClassVar[int] = 1
    max_prompt_chars: ClassVar[int] = len(IMAGE)

    def __post_init__(self):
        super().__post_init__()
        base.check_option("dot", self.dot, 1, 64)

    def _generate(self, key: str) -> Example:
        example = super()._generate(key)
        text, dot = example.prompt[:-1], self.dot
        widest = self.terms * (self.digits + 1) - 1
        picture, pen = drawing.canvas(4 * dot * (widest + widest % 2), 8 * dot)
        drawing.write(pen, (0, dot), text, dot)
        return _example(picture, "", example.answer, example.demonstration, text)


@dataclass(frozen=True)
class CountShapes(Visual):
    """How many of the shapes in a grid of cells are, say, red squares.

    Args:
      size: see `Visual`.
      cells: along a side; more are harder.
      kinds: of shapes, up to 3: circle, square, triangle.
      colours: up to 4: red, green, blue, yellow.
      slip: probability of another number in a demonstration, in [0, 1).
    """

    cells: int = 4
    kinds: int = 3
    colours: int = 3
    slip: float = 0.0

    name: ClassVar[str] = "count_shapes"
    alphabet: ClassVar[str] = "".join(sorted(set("0123456789 =".join([*KINDS, *drawing.COLOURS]))))
    bounds: ClassVar[Bounds] = {"cells": (2, 10), "kinds": (1, 3), "colours": (1, 4)}

    def __post_init__(self):
        super().__post_init__()
        base.check_probability("slip", self.slip)

    def _generate(self, key: str) -> Example:
        count, kinds = self.cells**2, KINDS[: self.kinds]
        colours = list(drawing.COLOURS)[: self.colours]
        things = [(kind, colour) for kind in kinds for colour in colours]
        # A wanted number first: drawn one by one, small numbers alone would be likely.
        most, wanted, *drawn = draw(key, [count + 1, len(things)] + [2**32] * (2 * count))
        order = sorted(range(count), key=drawn[:count].__getitem__)
        others = [None, *(thing for n, thing in enumerate(things) if n != wanted)]
        held = [others[d % len(others)] for d in drawn[count:]]
        for cell in order[:most]:
            held[cell] = things[wanted]
        picture, pen = drawing.canvas(self.size, self.size)
        side = self.size / self.cells
        for n, thing in enumerate(held):
            if thing:
                x, y = n % self.cells * side, n // self.cells * side
                box = [x + side / 8, y + side / 8, x + 7 * side / 8, y + 7 * side / 8]
                drawing.shape(pen, thing[0], box, drawing.COLOURS[thing[1]])
        kind, colour = things[wanted]
        luck, error = draw(f"{key}/slips", [base.SLIP_UNITS, count])
        slipped = (most + (luck < self.slip * base.SLIP_UNITS) * (1 + error)) % (count + 1)
        shows = f"{held}{self.cells}"
        return _example(picture, f"{colour} {kind}=", str(most), str(slipped), shows)


@dataclass(frozen=True)
class ReadClock(Visual):
    """The time that the hands of a clock show, as 3:25.

    Args:
      size: see `Visual`.
      step: minutes of which the time is a multiple, a divisor of 60: 60 is easy, 1 is hard.
    """

    step: int = 5

    name: ClassVar[str] = "read_clock"
    alphabet: ClassVar[str] = "0123456789:="

    def __post_init__(self):
        super().__post_init__()
        if self.step not in [n for n in range(1, 61) if 60 % n == 0]:
            raise ValueError(f"step must be a divisor of 60, got {self.step!r}")

    def _generate(self, key: str) -> Example:
        # A hand's width and the dial's shade differ, or there would be 720 examples at most.
        hour, part, width, shade = draw(key, [12, 60 // self.step, 3, 64])
        minute, middle = part * self.step, self.size / 2
        picture, pen = drawing.canvas(self.size, self.size)
        pen.ellipse([1, 1, self.size - 2, self.size - 2], fill=(255 - shade,) * 3, outline=(0,) * 3)

        def hand(turn, inner, outer, thick):
            x, y = math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn)
            ends = [middle + middle * r * part for r in (inner, outer) for part in (x, y)]
            pen.line(ends, fill=drawing.BLACK, width=max(1, round(thick * self.size / 64)))

        for tick in range(12):
            hand(tick / 12, 0.85, 0.97, 3 if tick == 0 else 1)
        hand((hour + minute / 60) / 12, 0, 0.45, 3 + width)
        hand(minute / 60, 0, 0.8, 1 + width)
        time = f"{hour or 12}:{minute:02}"
        return _example(picture, "=", time, time, f"{time}/{width}/{shade}")


@dataclass(frozen=True)
class ChartValue(Visual):
    """The value of one of the bars of a chart; lines are drawn at every quarter of its height.

    Args:
      size: see `Visual`.
      bars: up to 8, with the names A to H; more are harder.
      largest: values are from 1 to this; larger ones are harder.
    """

    bars: int = 4
    largest: int = 8

    name: ClassVar[str] = "chart_value"
    alphabet: ClassVar[str] = "0123456789=ABCDEFGH"
    bounds: ClassVar[Bounds] = {"bars": (1, 8), "largest": (2, 99)}

    def _generate(self, key: str) -> Example:
        bar, colour, *values = draw(key, [self.bars, 4] + [self.largest] * self.bars)
        picture, pen = drawing.canvas(self.size, self.size)
        dot = max(1, self.size // 64)
        foot, wide = self.size - 8 * dot, self.size / self.bars
        for quarter in range(5):
            y = foot * quarter / 4
            pen.line([0, y, self.size, y], fill=(190,) * 3, width=1)
        for n, value in enumerate(values):
            x, top = n * wide, foot * (1 - (value + 1) / self.largest)
            fill = list(drawing.COLOURS.values())[colour]
            pen.rectangle([x + wide / 5, top, x + wide * 4 / 5, foot], fill=fill)
            drawing.write(pen, (x + wide / 2 - 1.5 * dot, foot + dot), "ABCDEFGH"[n], dot)
        prompt, answer = f"{'ABCDEFGH'[bar]}=", str(values[bar] + 1)
        return _example(picture, prompt, answer, answer, f"{values}{colour}")


@dataclass(frozen=True)
class Maze(Visual):
    """A way of U, D, L, R from the red cell to the green one, past black ones; any that arrives.

    Args:
      size: see `Visual`.
      cells: along a side; more are harder.
      walls: share of cells that are black, in per cent.
    """

    cells: int = 5
    walls: int = 25

    name: ClassVar[str] = "maze"
    alphabet: ClassVar[str] = "=DLRU"
    bounds: ClassVar[Bounds] = {"cells": (3, 20), "walls": (0, 40)}  # with more, no way leads far

    @property
    def max_completion_chars(self) -> int:
        """No way is longer."""
        return self.cells**2

    def _generate(self, key: str) -> Example | None:
        count = self.cells**2
        start, goal, *luck = draw(key, [count, count - 1] + [100] * count)
        goal += goal >= start
        cells = ["#" if n < self.walls else "." for n in luck]
        cells[start], cells[goal] = "S", "G"
        rows = ("".join(cells[i : i + self.cells]) for i in range(0, count, self.cells))
        way = self._shortest(grid := "/".join(rows))
        if way is None:
            return None
        picture, pen = drawing.canvas(self.size, self.size)
        side, fills = self.size / self.cells, {"#": drawing.BLACK, ".": drawing.WHITE}
        fills |= {"S": drawing.COLOURS["red"], "G": drawing.COLOURS["green"]}
        for n, cell in enumerate(cells):
            x, y = n % self.cells * side, n // self.cells * side
            pen.rectangle([x, y, x + side - 1, y + side - 1], fill=fills[cell])
        return _example(picture, "=", grid, way, grid)

    def _walk(self, grid: str, way: str) -> int | None:
        """Where in the text a way ends; None if it leaves the grid, or is in a black cell."""
        place, row = grid.index("S"), self.cells + 1
        for move in way:
            place += {"D": row, "L": -1, "R": 1, "U": -row}[move]
            if not 0 <= place < len(grid) or grid[place] in "#/":
                return None
        return place

    def _shortest(self, grid: str) -> str | None:
        ways, seen = [""], {None}
        for way in ways:  # grows meanwhile
            if (place := self._walk(grid, way)) not in seen:
                if grid[place] == "G":
                    return way
                seen.add(place)
                ways += [way + move for move in MOVES]
        return None

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the way ends in the green cell, and is never outside or in a black one."""
        if set(completion) - set(MOVES) or len(completion) > self.cells**2:
            return 0.0
        place = self._walk(example.answer, completion)
        return float(place is not None and example.answer[place] == "G")
