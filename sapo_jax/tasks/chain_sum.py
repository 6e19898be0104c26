"""Chain sum: add and subtract from left to right modulo 100, every step written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sapo_jax.tasks.base import Example, GeneratedExamples, check_option, draw, make_example

SLIP_UNITS = 10**6


@dataclass(frozen=True)
class ChainSum:
    """``7+5-3+8=`` is answered by ``7+5=12;12-3=9;9+8=17``.

    The result of every step is taken modulo ``modulus``, which keeps it non-negative: with the
    default, 3-5=98 and 60+50=10. Operands are written as drawn, uniform in [0, 10**digits).

    Demonstrations may be those of a teacher who slips: with probability ``slip`` the result of a
    step is another number, and the chain goes on from there. Answers are always right.

    Args:
      terms: operands of a problem, at least 2.
      digits: digits of the largest operand, 1 to 3.
      modulus: at least 2.
      slip: probability of a wrong step in a demonstration, in [0, 1).

    Raises:
      ValueError: an option is out of its range.
    """

    terms: int = 6
    digits: int = 1
    modulus: int = 100
    slip: float = 0.0

    name: ClassVar[str] = "chain_sum"
    alphabet: ClassVar[str] = "+-0123456789;="

    def __post_init__(self):
        check_option("terms", self.terms, 2)
        check_option("digits", self.digits, 1, 3)
        check_option("modulus", self.modulus, 2)
        if not 0 <= self.slip < 1:
            raise ValueError(f"slip must be a number in [0, 1), got {self.slip!r}")

    @property
    def max_prompt_chars(self) -> int:
        """Every operand at full width, with the sign or the '=' after it."""
        return self.terms * (self.digits + 1)

    @property
    def max_completion_chars(self) -> int:
        """Every step at full width, with its operator, its '=' and the ';' between steps."""
        result = len(str(self.modulus - 1))
        steps = self.terms - 1
        running = self.digits + (steps - 1) * result
        return running + steps * (self.digits + result + 2) + steps - 1

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of ``"train"`` or ``"test"``; see ``Task.examples``."""
        return GeneratedExamples(split, self._generate)

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the text after the last '=' is the answer, character for character."""
        _, equals, result = completion.rpartition("=")
        return float(bool(equals) and result == example.answer)

    def _generate(self, key: str) -> Example:
        steps = self.terms - 1
        values = draw(key, [10**self.digits] * self.terms + [2] * steps)
        first, operands, minus = values[0], values[1 : self.terms], values[self.terms :]
        terms = [f"-{x}" if sign else f"+{x}" for x, sign in zip(operands, minus, strict=True)]
        total, written, demonstration = first, first, []
        slips = draw(f"{key}/slips", [SLIP_UNITS, self.modulus - 1] * steps)
        for term, luck, error in zip(terms, slips[::2], slips[1::2], strict=True):
            total = (total + int(term)) % self.modulus
            wrong = 1 + error if luck < self.slip * SLIP_UNITS else 0
            result = (written + int(term) + wrong) % self.modulus
            demonstration.append(f"{written}{term}={result}")
            written = result
        prompt = f"{first}{''.join(terms)}="
        return make_example(prompt, str(total), ";".join(demonstration))
