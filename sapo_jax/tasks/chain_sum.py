"""Chain sum: add and subtract from left to right modulo 100, every step written out."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sapo_jax.tasks.base import (
    SLIP_UNITS,
    Example,
    Generated,
    check_option,
    check_probability,
    draw,
    make_example,
)

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class ChainSum(Generated):
    """``7+5-3+8=`` is answered by ``7+5=12;12-3=9;9+8=17``.

    The result of every step is taken modulo ``modulus``, which keeps it non-negative: with the
    default, 3-5=98 and 60+50=10. Operands are written as drawn, uniform in [0, below).

    Demonstrations may be those of a teacher who slips: with probability ``slip`` the result of a
    step is another number, and the chain goes on from there, unless the teacher notices it, with
    probability ``notice``, and takes the step again: ``7+5=13!7+5=12;12-3=9``. Answers are always
    right. With ``labels`` numbers and the steps that take them have letters, so that no steps need
    to be counted: ``7a+5b-3=`` is answered by ``a7+5=12b12-3=9``.

    Args:
      terms: operands of a problem, at least 2.
      digits: digits of the largest operand, 1 to 3.
      modulus: at least 2.
      slip: probability of a wrong step in a demonstration, in [0, 1).
      notice: probability that a slip is noticed, in [0, 1].
      labels: whether steps have letters; of 27 operands at most.
      below: what operands are below, 10**digits at most; None: 10**digits.

    Raises:
      ValueError: an option is out of its range.
    """

    terms: int = 6
    digits: int = 1
    modulus: int = 100
    slip: float = 0.0
    notice: float = 0.0
    labels: bool = False
    below: int | None = None

    name: ClassVar[str] = "chain_sum"

    def __post_init__(self):
        check_option("terms", self.terms, 2, 1 + len(LETTERS) if self.labels else None)
        check_option("digits", self.digits, 1, 3)
        check_option("modulus", self.modulus, 2)
        if self.below is not None:
            check_option("below", self.below, 1, 10**self.digits)
        check_probability("slip", self.slip)
        if not 0 <= self.notice <= 1:
            raise ValueError(f"notice must be a number in [0, 1], got {self.notice!r}")

    @property
    def alphabet(self) -> str:
        """With '!' only where slips are noticed, and letters in place of ';'."""
        marks = ("=" + LETTERS[: self.terms - 1]) if self.labels else ";="
        return "!" * (self.notice > 0) + "+-0123456789" + marks

    @property
    def max_prompt_chars(self) -> int:
        """Every operand at full width, with the sign or the '=' after it, and a label before it."""
        return self.terms * (self.digits + 1) + (self.terms - 1) * self.labels

    @property
    def max_completion_chars(self) -> int:
        """Every step at full width, with its operator, its '=' and the ';' between steps.

        Where slips are noticed, every step twice.
        """
        result, steps = len(str(self.modulus - 1)), self.terms - 1
        running = self.digits + (steps - 1) * result
        once = running + steps * (self.digits + result + 3)
        return once * (1 + (self.notice > 0)) - 1 + self.labels

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the text after the last '=' is the answer, character for character."""
        _, equals, result = completion.rpartition("=")
        return float(bool(equals) and result == example.answer)

    def _generate(self, key: str) -> Example:
        steps = self.terms - 1
        values = draw(key, [self.below or 10**self.digits] * self.terms + [2] * steps)
        first, operands, minus = values[0], values[1 : self.terms], values[self.terms :]
        terms = [f"-{x}" if sign else f"+{x}" for x, sign in zip(operands, minus, strict=True)]
        total, written, demonstration = first, first, []
        slips = draw(f"{key}/slips", [SLIP_UNITS, self.modulus - 1] * steps)
        seen = draw(f"{key}/notices", [SLIP_UNITS] * steps)
        for k, (term, eye) in enumerate(zip(terms, seen, strict=True)):
            luck, error = slips[2 * k : 2 * k + 2]
            right = (written + int(term)) % self.modulus
            wrong = luck < self.slip * SLIP_UNITS
            results = [(right + 1 + error) % self.modulus] * wrong
            if not wrong or eye < self.notice * SLIP_UNITS:
                results.append(right)
            demonstration.append("!".join(f"{written}{term}={x}" for x in results))
            total, written = (total + int(term)) % self.modulus, results[-1]
        if self.labels:
            terms, demonstration = map(_labelled, (terms, demonstration))
        mark = "" if self.labels else ";"
        prompt = f"{first}{''.join(terms)}="
        return make_example(prompt, str(total), mark.join(demonstration))


def _labelled(parts: Sequence[str]) -> list[str]:
    return [letter + part for letter, part in zip(LETTERS, parts, strict=False)]
