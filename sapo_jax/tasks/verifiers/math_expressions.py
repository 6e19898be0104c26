r"""The value of a LaTeX expression, read by a small grammar of school and contest notation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from sapo_jax.tasks.verifiers.math_numbers import Numbers, UnreadableError

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell infty"
)
_NAMES = {f"\\{letter}" for letter in _GREEK.split()}
_DECORATED = {r"\vec", r"\hat", r"\bar", r"\dot", r"\mathbf", r"\mathcal", r"\overline", r"\tilde"}
_CALLED = set("fghFGH")  # f(x+1) is a value of f; of other letters, x(2) is, but x(y+1) a product
_FUNCTIONS = {
    r"\sin": "sin", r"\cos": "cos", r"\tan": "tan", r"\cot": "cot", r"\sec": "sec", r"\csc": "csc",
    r"\arcsin": "asin", r"\arccos": "acos", r"\arctan": "atan", r"\sinh": "sinh", r"\cosh": "cosh",
    r"\tanh": "tanh", r"\ln": "ln", r"\log": "log10", r"\lg": "log10", r"\exp": "exp",
}  # fmt: skip
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_STARTS = {*_CLOSING, *_NAMES, *_DECORATED, *_FUNCTIONS, r"\frac", r"\sqrt", r"\binom", r"\pi"}
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|\S)")
_DERIVATIVE = re.compile(r"\\frac\s*\{?\s*d(?:\^\{?\d\}?)?\s*\w?\s*\}?\s*\{?\s*d\s*[A-Za-z]")

_CROSS = re.compile(r"\\times\s*\\(?:vec|hat|bar|mathbf|overline|tilde)")


class Expression:
    """An expression that is computed while it is read.

    Args:
      text: LaTeX.
      numbers: does the arithmetic.
      variable: the value of the variable of a name.
    """

    def __init__(self, text: str, numbers: Numbers, variable: Callable[[str], Fraction]):
        if _DERIVATIVE.search(text) or _CROSS.search(text):
            raise UnreadableError("a derivative, or a product that has an order")
        self._tokens, self._at = _TOKEN.findall(text), 0
        self._numbers, self._variable, self._in_bars = numbers, variable, False
        self.closed = True  # whether there is no variable
        self.real = True  # whether nothing is the root or logarithm of a negative number
        self.value = self._sum()
        if self._next:
            raise UnreadableError(f"{self._next} is not expected")

    @property
    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._next
        if not token or (expected and token != expected):
            raise UnreadableError(f"{token or 'the end'} is not expected")
        self._at += 1
        return token

    def _took(self, *tokens: str) -> bool:
        found = self._next in tokens
        self._at += found
        return found

    def _sum(self) -> Any:
        total: Any = Fraction(0)
        sign = self._take() if self._next in ("+", "-") else "+"
        while sign:
            term = self._product()
            total = self._numbers.add(total, -term if sign == "-" else term)
            sign = self._take() if self._next in ("+", "-") else ""
        return total

    def _product(self) -> Any:
        first = self._at
        value, ambiguous = self._factor(), False
        while True:
            if self._took("*", r"\cdot", r"\times"):
                value, ambiguous = self._numbers.multiply(value, self._factor()), False
            elif self._took("/", r"\div"):
                value = self._numbers.divide(value, self._factor())
                # 1/2x is half of x; nobody knows what x/2y is
                numerals = [token[0].isdigit() for token in self._tokens[first : self._at]]
                ambiguous = numerals != [True, False, True]
            elif self._starts_factor() and not ambiguous:
                value = self._numbers.multiply(value, self._factor())
            else:
                return value

    def _starts_factor(self) -> bool:
        if self._next == "|":
            return not self._in_bars
        counted = self._next[:1].isdigit() and self._tokens[self._at - 1] == "!"  # 3!7!
        return self._next.isalpha() or self._next in _STARTS or counted

    def _factor(self) -> Any:
        if self._next in _FUNCTIONS:
            return self._function(_FUNCTIONS[self._take()])
        function = self._next in _CALLED
        value = self._atom()
        if self._took("!"):
            value = self._numbers.count(math.factorial, value)
        if self._took("^"):
            if self._took(r"\circ"):
                return self._numbers.divide(self._numbers.multiply(value, self._pi), Fraction(180))
            exponent = self._exponent()
            value = self._noted(self._numbers.power(value, exponent), value, exponent)
            if function and self._next == "(":
                raise UnreadableError("a power of a function")
        if self._next in ("^", "!", "_", "'"):
            raise UnreadableError(f"another {self._next}")
        return value

    def _noted(self, value: Any, *arguments: Any) -> Any:
        mpc = self._numbers.mp.mpc
        if isinstance(value, mpc) and not any(isinstance(x, mpc) for x in arguments):
            self.real = False
        return value

    def _exponent(self) -> Any:
        if self._took("-"):
            return -self._exponent()
        return Fraction(self._take()) if self._next.isdigit() else self._atom()

    @property
    def _pi(self) -> Any:
        return +self._numbers.mp.pi

    def _atom(self) -> Any:
        token = self._take()
        if token[0].isdigit() or (token[0] == "." and token > "."):
            return self._number(token)
        if token in _CLOSING:
            return self._bracket(token)
        if token == "|" and not self._in_bars:
            self._in_bars = True
            value = abs(self._sum())
            self._take("|")
            self._in_bars = False
            return value
        if token == r"\frac":
            above = self._argument()
            return self._numbers.divide(above, self._argument())
        if token == r"\binom":
            n = self._argument()
            return self._numbers.count(math.comb, n, self._argument())
        if token == r"\sqrt":
            degree = self._bracket("[") if self._took("[") else Fraction(2)
            if self._next[:1].isdigit() and len(self._next) > 1:
                raise UnreadableError("a root of the first digit")
            value = self._argument()
            return self._noted(self._numbers.root(value, degree), value)
        return self._pi if token == r"\pi" else self._name(token)

    def _bracket(self, opening: str) -> Any:
        outside, self._in_bars = self._in_bars, False
        value = self._sum()
        self._take(_CLOSING[opening])
        self._in_bars = outside
        return value

    def _number(self, token: str) -> Any:
        """A number, with the fraction behind it that makes it a mixed one."""
        value = Fraction(token.removesuffix("."))
        if self._next == "_":
            raise UnreadableError("a base")
        if self._next != r"\frac":
            return value
        start = self._at + 1
        part = self._atom()
        if not all(t.isdigit() or t in "{}" for t in self._tokens[start : self._at]):
            return self._numbers.multiply(value, part)
        if not token.isdigit() or not 0 < part < 1:
            raise UnreadableError("a number before a fraction")
        return value + part

    def _argument(self) -> Any:
        """What stands in braces, or the next digit, letter or command."""
        token = self._next
        if token.isdigit():
            self._tokens[self._at : self._at + 1] = [token[0], token[1:]] if token[1:] else [token]
            return Fraction(self._take())
        return self._atom()

    def _name(self, token: str) -> Any:
        if token in _DECORATED:
            token += self._raw()
        elif not token.isalpha() and token not in _NAMES:
            raise UnreadableError(f"{token} is unknown")
        if self._took("_"):
            token += "_" + self._raw()
        while self._took("'"):
            token += "'"
        if token == "e":
            return +self._numbers.mp.e
        if token == "i":
            return self._numbers.mp.mpc(0, 1)
        lone = self._tokens[self._at + 2 : self._at + 3] == [")"]  # f(2), u(t)
        if self._next == "(" and (lone or token[0] in _CALLED or token[-1] == "'"):
            self._take()  # nothing is known of the function: another number for each argument
            token += f"({self._numbers.fingerprint(self._sum())}"
            while self._took(","):
                token += f",{self._numbers.fingerprint(self._sum())}"
            self._take(")")
        self.closed = False
        return self._variable(token)

    def _raw(self) -> str:
        """The text of an argument."""
        if not self._took("{"):
            return self._take()
        start, depth = self._at, 1
        while depth:
            token = self._take()
            depth += (token == "{") - (token == "}")
        return "".join(self._tokens[start : self._at - 1])

    def _function(self, name: str) -> Any:
        base = self._argument() if name == "log10" and self._took("_") else None
        exponent = self._exponent() if self._took("^") else 1
        if exponent == -1 and name in ("sin", "cos", "tan"):
            name, exponent = f"a{name}", 1
        bracket = self._next in ("(", "{", "[", "|")
        x = self._atom() if bracket else self._bare_argument()
        if self._next in ("^", "!", "'", "_"):
            raise UnreadableError("a power behind a function")
        value = self._noted(self._numbers.apply(name if base is None else "ln", x), x)
        if base is not None:
            value = self._numbers.divide(value, self._numbers.apply("ln", base))
        if exponent == 1:
            return value
        if not isinstance(exponent, Fraction) or exponent < 1:
            raise UnreadableError("a power of a function")
        return self._numbers.power(value, exponent)

    def _bare_argument(self) -> Any:
        """Of sin 2x: the factors up to an operator, a bracket or another function."""
        inner, start = self._next in _FUNCTIONS, self._at
        value = self._factor()
        while not inner and self._starts_factor() and self._next not in ("(", "[", *_FUNCTIONS):
            value = self._numbers.multiply(value, self._factor())
        if self._next in ("/", r"\div"):
            raise UnreadableError("a slash behind an argument without brackets")
        if self._next == "(" and "".join(self._tokens[start : self._at]).isdigit():
            raise UnreadableError("a bracket behind a number without one")  # log2(3)
        return value
