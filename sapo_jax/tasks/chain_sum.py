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
    step is another number, and the chain goes on from there, unless the teacher notices it, with
    probability ``notice``, and takes the step again: ``7+5=13!7+5=12;12-3=9``. Answers are always
    right. With ``rewrite`` a step writes what is left of the sum, ``12-3+8=9+8=17``, which is
    longer, and needs no count of the steps so far.

    Args:
      terms: operands of a problem, at least 2.
      digits: digits of the largest operand, 1 to 3.
      modulus: at least 2.
      slip: probability of a wrong step in a demonstration, in [0, 1).
      notice: probability that a slip is noticed, in [0, 1].
      rewrite: whether a step writes what is left, instead of itself.

    Raises:
      ValueError: an option is out of its range.
    """

    terms: int = 6
    digits: int = 1
    modulus: int = 100
    slip: float = 0.0
    notice: float = 0.0
    rewrite: bool = False

    name: ClassVar[str] = "chain_sum"

    def __post_init__(self):
        check_option("terms", self.terms, 2)
        check_option("digits", self.digits, 1, 3)
        check_option("modulus", self.modulus, 2)
        if not 0 <= self.slip < 1:
            raise ValueError(f"slip must be a number in [0, 1), got {self.slip!r}")
        if not 0 <= self.notice <= 1:
            raise ValueError(f"notice must be a number in [0, 1], got {self.notice!r}")

    @property
    def alphabet(self) -> str:
        """With '!' only where slips are noticed."""
        return "!" * (self.notice > 0) + "+-0123456789" + ";" * (not self.rewrite) + "="

    @property
    def max_prompt_chars(self) -> int:
        """Every operand at full width, with the sign or the '=' after it."""
        return self.terms * (self.digits + 1)

    @property
    def max_completion_chars(self) -> int:
        """Every step at full width, with its operator, its '=' and the ';' between steps.

        Where slips are noticed, every step twice.
        """
        result, steps = len(str(self.modulus - 1)), self.terms - 1
        if self.rewrite:
            left = (self.digits + 1) * steps * (steps - 1) // 2
            once = steps * (result + 1) + left
        else:
            running = self.digits + (steps - 1) * result
            once = running + steps * (self.digits + result + 3)
        return once * (1 + (self.notice > 0)) - 1

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
        seen = draw(f"{key}/notices", [SLIP_UNITS] * steps)
        for k, (term, eye) in enumerate(zip(terms, seen, strict=True)):
            luck, error = slips[2 * k : 2 * k + 2]
            right, rest = (written + int(term)) % self.modulus, "".join(terms[k + 1 :])
            wrong = luck < self.slip * SLIP_UNITS
            results = [(right + 1 + error) % self.modulus] * wrong
            if not wrong or eye < self.notice * SLIP_UNITS:
                results.append(right)
            each = [f"{x}{rest}" if self.rewrite else f"{written}{term}={x}" for x in results]
            demonstration.append("!".join(each))
            total, written = (total + int(term)) % self.modulus, results[-1]
        prompt = f"{first}{''.join(terms)}="
        return make_example(prompt, str(total), ("=" if self.rewrite else ";").join(demonstration))
