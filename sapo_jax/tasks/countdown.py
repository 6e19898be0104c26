"""Countdown: reach a target with given numbers, each used exactly once, by + - * /."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from sapo_jax.tasks.base import Example, Generated, check_option, draw, make_example

MAX_EXPRESSION_CHARS = 256
MAX_DEPTH = 32  # nested parentheses
_TOKEN = re.compile(r"0|[1-9][0-9]{0,5}|[-+*/()]")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Countdown(Generated):
    """``3,5,12>45:`` is answered by an expression of value 45, such as ``(12-3)*5``.

    Numbers are uniform in [1, max_number] and written in ascending order, so that a problem has
    one prompt; targets are in [1, max_target]. Every problem is made from a solution with positive
    integers for intermediate values; the verifier accepts any exact solution.

    Args:
      numbers: numbers of a problem, 2 to 8.
      max_number: 1 to 999999.
      max_target: 1 to 999999.

    Raises:
      ValueError: an option is out of its range.
    """

    numbers: int = 3
    max_number: int = 20
    max_target: int = 100

    name: ClassVar[str] = "countdown"
    alphabet: ClassVar[str] = "()*+,-/0123456789:>"

    def __post_init__(self):
        check_option("numbers", self.numbers, 2, 8)
        check_option("max_number", self.max_number, 1, 999_999)
        check_option("max_target", self.max_target, 1, 999_999)

    @property
    def max_prompt_chars(self) -> int:
        """Every number at full width with ',' or '>' after it, the target, and ':'."""
        return self.numbers * (len(str(self.max_number)) + 1) + len(str(self.max_target)) + 1

    @property
    def max_completion_chars(self) -> int:
        """Every number at full width, the operators, parentheses around all but the last step."""
        return (
            self.numbers * len(str(self.max_number)) + (self.numbers - 1) + 2 * (self.numbers - 2)
        )

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the completion is an expression of the prompt's numbers that hits its target."""
        numbers, _, target = example.prompt.removesuffix(":").partition(">")
        try:
            tokens = tokenize(completion)
            used = sorted(int(token) for token in tokens if token.isdecimal())
            if used != sorted(map(int, numbers.split(","))):
                return 0.0
            return float(evaluate(tokens) == int(target))
        except (ValueError, ZeroDivisionError):
            return 0.0

    def _generate(self, key: str) -> Example | None:
        sizes = range(self.numbers, 1, -1)
        merges = [bound for size in sizes for bound in (size, size - 1, 12)]
        values = draw(key, [self.max_number] * self.numbers + merges)
        numbers = [1 + value for value in values[: self.numbers]]
        target, solution = _solution(numbers, values[self.numbers :])
        if target > self.max_target:
            return None
        prompt = ",".join(map(str, sorted(numbers))) + f">{target}:"
        return make_example(prompt, solution, solution)


def tokenize(text: str) -> list[str]:
    """Split an expression into numbers of at most 6 digits, operators and parentheses.

    Raises:
      ValueError: the text is too long, or holds anything else (spaces, other digits).
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION_CHARS} characters")
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise ValueError(f"{text!r} holds characters that no expression has")
    return tokens


def evaluate(tokens: Sequence[str]) -> Fraction:
    """Exact value of an expression, by recursive descent; * and / bind tighter than + and -.

    Args:
      tokens: as ``tokenize`` returns them.

    Raises:
      ValueError: the tokens are no expression, or nest deeper than ``MAX_DEPTH``.
      ZeroDivisionError: a divisor is zero.
    """
    rest = list(reversed(tokens))
    value = _expression(rest, 0, 0)
    if rest:
        raise ValueError(f"unexpected {rest[-1]!r} after an expression")
    return value


def _expression(rest: list[str], precedence: int, depth: int) -> Fraction:
    """Take from the end of ``rest`` an expression whose operators bind tighter than given."""
    value = _operand(rest, depth)
    while rest and _PRECEDENCE.get(rest[-1], 0) > precedence:
        symbol = rest.pop()
        value = _APPLY[symbol](value, _expression(rest, _PRECEDENCE[symbol], depth))
    return value


def _operand(rest: list[str], depth: int) -> Fraction:
    """Take a number or a parenthesised expression from the end of ``rest``."""
    token = rest.pop() if rest else ""
    if token == "(" and depth < MAX_DEPTH:
        value = _expression(rest, 0, depth + 1)
        if not rest or rest.pop() != ")":
            raise ValueError("missing ')'")
        return value
    if not token.isdecimal():
        raise ValueError(f"expected a number, got {token!r}")
    return Fraction(int(token))


def _solution(numbers: list[int], choices: list[int]) -> tuple[int, str]:
    """Merge the numbers pairwise into one expression.

    Args:
      numbers: positive integers.
      choices: per merge, two positions in the shrinking list and a choice of operator, the
        latter below 12: a multiple of 2, 3 and 4, the possible counts of operators.

    Returns:
      Value and text of the expression.
    """
    pool = [(number, str(number), 3) for number in numbers]
    for k in range(0, len(choices), 3):
        pair = pool.pop(choices[k]), pool.pop(choices[k + 1])
        (a, left, left_binds), (b, right, right_binds) = sorted(pair, reverse=True)
        symbols = "+*" + "-" * (a > b) + "/" * (a % b == 0)
        symbol = symbols[choices[k + 2] % len(symbols)]
        binds = _PRECEDENCE[symbol]
        if left_binds < binds:
            left = f"({left})"
        if right_binds < binds + (symbol in "-/"):
            right = f"({right})"
        value = a // b if symbol == "/" else _APPLY[symbol](a, b)
        pool.append((value, left + symbol + right, binds))
    return pool[0][:2]
