r"""Whether expressions have the same value.

Those with variables are the same if they agree, wherever the first is real, at a fixed set of
rational points. `UnreadableError` says that one has no value, or that no precision decides.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from sapo_jax.tasks.verifiers.math_expressions import Expression
from sapo_jax.tasks.verifiers.math_numbers import (
    DIGITS,
    Budget,
    ImpreciseError,
    Numbers,
    UnreadableError,
)

SCALES = (1, 1, Fraction(1, 5), Fraction(1, 5), 1, 3, 200, 200, 20_000, 20_000)  # of the points
NEAR = 6  # points that always count; those further away tell |x - 50| from 50 - x
WHOLE = 12  # points in whole numbers instead, where something is counted
_LOCK = threading.Lock()  # mpmath's contexts change while they compute


class Point(NamedTuple):
    """The values of two expressions at one point."""

    values: tuple[Any, Any]
    real: bool  # whether the first needs no root or logarithm of a negative number


def equal(gold: str, answer: str, budget: Budget) -> bool:
    """Whether two expressions are the same wherever the first is real."""

    def agree(numbers: Numbers, points: list[Point]) -> bool:
        real = [p for p in points if p.real]
        return all(numbers.close(*p.values) for p in (real if len(real) > 1 else points))

    return _decide((gold, answer), budget, agree)


def proportional(gold: str, answer: str, budget: Budget, *, positive: bool = False) -> bool:
    """Whether expressions with variables differ by a constant factor, not 0, perhaps positive."""

    def agree(numbers: Numbers, points: list[Point]) -> bool:
        (g, a), *others = (p.values for p in points)
        if not others or not g or not a:
            return False
        if positive and numbers.sign(numbers.divide(g, a)) < 0:
            return False
        times = numbers.multiply
        return all(numbers.close(times(x, a), times(y, g)) for x, y in others)

    return _decide((gold, answer), budget, agree)


def order(left: str, right: str, budget: Budget) -> int:
    """-1, 0 or 1, as a real number without variables is less, equal, or more than another."""

    def compare(numbers: Numbers, points: list[Point]) -> int:
        x, y = points[0].values
        if len(points) > 1 or not points[0].real:
            raise UnreadableError("no number")
        return 0 if numbers.close(x, y) else numbers.sign(numbers.add(x, -y))

    return _decide((left, right), budget, compare)


def _decide(texts: tuple[str, str], budget: Budget, rule: Callable[..., Any]) -> Any:
    """What a rule says of the values, at the first precision that decides."""
    with _LOCK:
        for digits in DIGITS:
            numbers = Numbers(digits, budget)
            try:
                return rule(numbers, list(_points(texts, numbers)))
            except ImpreciseError:
                continue
    raise UnreadableError("no precision decides")


def _points(texts: tuple[str, str], numbers: Numbers) -> Iterator[Point]:
    whole = any("!" in text or r"\binom" in text for text in texts)
    far = any(re.search(r"\||\\sqrt", text) for text in texts)
    count = 0
    for k in range(WHOLE if whole else len(SCALES) if far else NEAR):

        def variable(name: str, k: int = k) -> Fraction:
            return _variable(name, k, whole)

        try:
            gold, answer = (Expression(text, numbers, variable) for text in texts)
        except (UnreadableError, ImpreciseError) as error:
            if k < NEAR and not (whole and isinstance(error, UnreadableError)):
                raise
            continue  # too far away, or no number of things
        yield Point((gold.value, answer.value), gold.real)
        count += 1
        if gold.closed and answer.closed:
            return
    if count < 4:
        raise UnreadableError("too few points")


def _variable(name: str, k: int, whole: bool) -> Fraction:
    """The value of a variable at point k: the first has one sign, later ones come in pairs."""
    noise = zlib.crc32(f"{k} {name}".encode())
    if whole:
        return Fraction(noise % 23 + 6)
    size = Fraction(noise % 89 + 20, 37) * SCALES[k]
    mixed = zlib.crc32(f"{k // 2} {name}".encode()) >> 16 if k > 1 else 0
    return -size if (mixed + k) % 2 else size
