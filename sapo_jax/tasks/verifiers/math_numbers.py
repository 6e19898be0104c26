"""Numbers that are exact where they are rational; all others have digits that decide, or say not.

They have 60, 400 or 3200 digits: where a sum loses a term or cancels, so that two values could not
be told apart, `ImpreciseError` asks for the next precision. A budget of work bounds the time and
memory of all that is computed for an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

DIGITS = (60, 400, 3200)
COSTS = {60: 1, 400: 5, 3200: 500}  # of a function's value, in units of about 0.1 ms
BUDGET = 5000  # units in which an answer must be judged
MAX_BITS = 1 << 16  # of the numerator or denominator of an exact number


class UnreadableError(ValueError):
    """What has no value here: a form outside of the grammar, 1/0, or too much work."""


class ImpreciseError(ValueError):
    """The digits do not decide."""


class Budget:
    """The work that may be done for an answer."""

    def __init__(self):
        self._left = float(BUDGET)

    def spend(self, work: float) -> None:
        """Take work from what is left; ``UnreadableError`` says that nothing is."""
        self._left -= work
        if self._left < 0:
            raise UnreadableError("too much work")


@functools.cache
def _context(digits: int) -> Any:
    import mpmath

    context = mpmath.mp.clone()
    context.dps = digits
    return context


class Numbers:
    """Arithmetic of exact fractions and of mpmath's numbers."""

    def __init__(self, digits: int, budget: Budget):
        self.mp, self._cost, self._budget = _context(digits), COSTS[digits], budget
        self._slack = self.mp.prec // 5  # bits by which sizes may differ in what is computed

    def add(self, x: Any, y: Any) -> Any:
        """x + y."""
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return self._checked(x + y)
        if not x or not y:
            return x or y
        x, y = self._inexact(x), self._inexact(y)
        sizes = self.mp.mag(x), self.mp.mag(y), self.mp.mag(x + y)
        if min(sizes) < max(sizes) - self._slack:
            raise ImpreciseError  # a term is lost, or nothing is left
        return self._checked(x + y)

    def multiply(self, x: Any, y: Any) -> Any:
        """x · y."""
        if not x or not y:
            return Fraction(0)
        if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
            x, y = self._inexact(x), self._inexact(y)
        return self._checked(x * y)

    def divide(self, x: Any, y: Any) -> Any:
        """x / y."""
        if not y:
            raise UnreadableError("division by zero")
        return self.multiply(x, 1 / y)

    def power(self, x: Any, y: Any) -> Any:
        """x to the power of y: real for odd roots of negative numbers, else the principal one."""
        exact = isinstance(y, Fraction)
        if not x:
            if not exact or y <= 0:
                raise UnreadableError("a power of 0")
            return Fraction(0)
        if exact and isinstance(x, Fraction) and (value := self._exact_power(x, y)) is not None:
            return value
        if exact and y.denominator in range(3, 37, 2) and self.sign(x) < 0:  # x^{1/3}, not (-1)^n
            power = self.power(-x, y)
            return -power if y.numerator % 2 else power
        if exact and y.denominator == 1 and abs(y) < 1 << 64:
            self._budget.spend(self._cost)
            return self._checked(self._inexact(x) ** int(y))
        return self.apply("power", x, y)

    def root(self, x: Any, degree: Any) -> Any:
        """A root, as ``power`` has it."""
        if not isinstance(degree, Fraction) or degree.denominator != 1 or degree < 2:
            raise UnreadableError("the degree of a root")
        return self.power(x, 1 / degree)

    def apply(self, function: str, *arguments: Any) -> Any:
        """The value of one of mpmath's functions."""
        self._budget.spend(self._cost)
        values = [self._inexact(x) for x in arguments]
        if any(v and abs(self.mp.mag(v)) > self._slack for v in values):
            raise ImpreciseError
        try:
            value = self._checked(getattr(self.mp, function)(*values))
        except ArithmeticError as error:
            raise UnreadableError(str(error)) from None
        if value and function not in ("power", "exp") and abs(self.mp.mag(value)) > self._slack:
            raise ImpreciseError  # at a zero, or a pole
        return value

    def count(self, of: Callable[..., int], *arguments: Any) -> Fraction:
        """A factorial or binomial coefficient."""
        for n in arguments:
            if not isinstance(n, Fraction) or n.denominator > 1 or not 0 <= n <= 5000:
                raise UnreadableError("what cannot be counted")
        self._budget.spend(max(arguments) / 100)
        return self._checked(Fraction(of(*map(int, arguments))))

    def close(self, x: Any, y: Any) -> bool:
        """Whether two numbers are the same."""
        if (isinstance(x, Fraction) and isinstance(y, Fraction)) or not x or not y:
            return x == y
        x, y = self._inexact(x), self._inexact(y)
        distance = max(self.mp.mag(x), self.mp.mag(y)) - self.mp.mag(x - y)
        if self.mp.prec // 2 < distance < self.mp.prec * 3 // 4:
            raise ImpreciseError
        return distance > self.mp.prec // 2

    def sign(self, x: Any) -> int:
        """Of a real number, and 0 for 0 and complex ones."""
        return 0 if isinstance(x, self.mp.mpc) else (x > 0) - (x < 0)

    def fingerprint(self, x: Any) -> str:
        """Text that is the same for the same numbers."""
        return self.mp.nstr(self._inexact(x), 20)

    def _inexact(self, x: Any) -> Any:
        if not isinstance(x, Fraction):
            return x
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > self._slack:
            raise ImpreciseError
        return self.mp.mpf(x.numerator) / x.denominator

    def _checked(self, x: Any) -> Any:
        """The number, if it is finite and of a size that can be computed with."""
        self._budget.spend(0.1)
        if isinstance(x, Fraction):
            bits = max(x.numerator.bit_length(), x.denominator.bit_length())
            self._budget.spend(bits / 1000)
            if bits > MAX_BITS:
                raise UnreadableError("a number that is too long")
        elif not self.mp.isfinite(x) or (x and abs(self.mp.mag(x)) > 1 << 128):
            raise UnreadableError("a number that is not finite")
        elif isinstance(x, self.mp.mpc) and not x.imag:
            return x.real
        return x

    def _exact_power(self, x: Fraction, y: Fraction) -> Fraction | None:
        bits = max(x.numerator.bit_length(), x.denominator.bit_length())
        if abs(x) == 1:
            return x ** (y.numerator % 2) if y.denominator == 1 or x == 1 else None
        if abs(y) * bits > MAX_BITS or y.denominator > bits:
            return None
        self._budget.spend(abs(y) * bits / 500)
        if y.denominator == 1:
            return x**y.numerator
        roots = [_exact_root(n, y.denominator) for n in (x.numerator, x.denominator)]
        return None if None in roots else Fraction(*roots) ** y.numerator


def _exact_root(n: int, degree: int) -> int | None:
    if n < 2:
        return n if n == 1 else None
    root, smaller = 0, 1 << -(-n.bit_length() // degree)
    while smaller != root:  # Newton, from above
        root, smaller = smaller, ((degree - 1) * smaller + n // smaller ** (degree - 1)) // degree
        smaller = min(root, smaller)
    return root if root**degree == n else None
