"""Chain sum: add and subtract from left to right, every step written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sapo_jax.tasks.base import Example, GeneratedExamples, check_option, draw, make_example


@dataclass(frozen=True)
class ChainSum:
    """``7+5-3+8=`` is answered by ``7+5=12;12-3=9;9+8=17``.

    The result of every step is taken modulo ``modulus``, which keeps it non-negative: with the
    default, 3-5=98 and 60+50=10. Operands are written as drawn, uniform in [0, 10**digits).

    Args:
        terms: operands of a problem, at least 2.
        digits: digits of the largest operand, 1 to 3.
        modulus: at least 2.

    Raises:
        ValueError: an option is out of its range.
    """

    terms: int = 6
    digits: int = 1
    modulus: int = 100

    name: ClassVar[str] = "chain_sum"
    alphabet: ClassVar[str] = "+-0123456789;="

    def __post_init__(self):
        check_option("terms", self.terms, 2)
        check_option("digits", self.digits, 1, 3)
        check_option("modulus", self.modulus, 2)

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
        values = draw(key, [10**self.digits] * self.terms + [2] * (self.terms - 1))
        total, operands, signs = values[0], values[1 : self.terms], values[self.terms :]
        prompt, steps = [str(total)], []
        for operand, sign in zip(operands, signs, strict=True):
            term = f"-{operand}" if sign else f"+{operand}"
            result = (total - operand if sign else total + operand) % self.modulus
            prompt.append(term)
            steps.append(f"{total}{term}={result}")
            total = result
        return make_example("".join(prompt) + "=", str(total), ";".join(steps))
