"""Whether two mathematical answers are the same: exact numbers, then words, then symbols."""

from __future__ import annotations

import re
from collections.abc import Callable

from sapo_jax.tasks.verifiers import math_text

_NAME = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]{2,})(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*")
_RELATION = re.compile(r"\\(?:leq?|geq?|lt|gt)(?:slant)?(?![A-Za-z])|[<>]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_UNFINISHED = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim|binom|gcd|lcm|max|min|sup|inf|det|mod|bmod|pmod)"
    r"(?![A-Za-z])|!|\\frac\s*\{?\s*(?:d|\\partial)|\\prime|'"
)
_AND = re.compile(r"\s*,?\s*(?:\\text\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z]))\s*")
_NEGATED = re.compile(r"\\(?:neq?|not|notin|approx|sim|dots|ldots|cdots)(?![A-Za-z])|\.\.|!=")

_WARM_UP = (
    ("[0,1)", "(0,1]"), (r"0\le x<1", "[0,1)"), ("x>3", r"(3,\infty)"), ("1,2", "2,3"),
    (r"\{1,2\}", r"\{2,1\}"), (r"(-\infty,3)\cup[4,5]", r"(3,4)"), ("(1,2,3)", "(3,2,1)"),
    (r"\sqrt{8}", r"3\sqrt{2}"), (r"\frac{\pi}{6}", r"\frac{\sqrt{3}}{2}+1"), ("x=1", "y=2x+3"),
    ("(x+1)^2", "x^2+2x+2"), (r"\frac{1}{x+1}", "(x-1)^{-1}"), (r"\log_2 3", r"\frac{\ln 3}{2}"),
    ("3+4i", "3-4i"), (r"2^{10}\cdot 3^5", r"6^{15}"), (r"(\frac{1}{2},\sqrt{3})", r"(1,\pi)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&x\\3&4\end{pmatrix}"),
)  # fmt: skip


def same(gold: str, answer: str, symbolic: Callable[[str, str], bool | None]) -> bool:
    """Whether an answer is right.

    - A literal number must be answered by a literal number of the same exact value: the question
      boxed again (``17*23``) earns nothing, nor does a rounded value. With a percent sign on one
      side only, both its readings pass (10% is 10, or 0.1).
    - A missing unit passes, another unit fails.
    - Words are compared as words.
    - All else is compared symbolically.

    Args:
      gold: the reference answer.
      answer: what was in the box.
      symbolic: compares two LaTeX expressions; None where it could not.
    """
    left, right = math_text.clean(gold), math_text.clean(answer)
    if left is None or right is None:
        return False
    if left == right:
        return True
    left, right = _same_side(left, right)
    (left, unit), (right, other) = math_text.split_unit(left), math_text.split_unit(right)
    left, percent = _percent(left, unit)
    right, other_percent = _percent(right, other)
    if not percent and not other_percent and unit and other and unit != other:
        return False
    values = math_text.number(left), math_text.number(right)
    if values[0] is not None:
        if values[1] is None:
            return False
        exact = [v / 100 if p else v for v, p in zip(values, (percent, other_percent), strict=True)]
        return exact[0] == exact[1] or (percent != other_percent and values[0] == values[1])
    if math_text.is_words(left) or math_text.is_words(right):
        return math_text.letters(left) == math_text.letters(right)
    left, right = _AND.sub(",", left), _AND.sub(",", right)
    if percent != other_percent or not comparable(left, right):
        return False
    return symbolic(math_text.exact_decimals(left), math_text.exact_decimals(right)) is True


def comparable(gold: str, answer: str) -> bool:
    """Whether an answer has a form that may be compared with the reference's by symbols.

    Refused are forms that math-verify takes for more than they say: unsolved equations and
    inequalities, chains of equations, unfinished sums and limits, lists of another length.
    """
    if _NEGATED.search(answer) or (_UNFINISHED.search(answer) and not _UNFINISHED.search(gold)):
        return False
    if answer.count("=") > gold.count("=") or answer.count("=") > 1 + answer.count(","):
        return False
    relations = bool(_RELATION.search(gold)), bool(_RELATION.search(answer))
    if relations[0] != relations[1]:
        interval, relation = (answer, gold) if relations[0] else (gold, answer)
        return interval.startswith(("(", "[")) and _solved(relation)
    if _is_tuple(gold) != _is_tuple(answer):
        return False
    return r"\pm" in gold + answer or _items(gold) == _items(answer)


def compare(gold: str, answer: str) -> bool:
    """Symbolic equality by math-verify; may hang or crash, so call it through `verifiers.forks`."""
    import math_verify

    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        math_verify.parse(
            rf"\boxed{{{text}}}",
            extraction_config=config,
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for text in (gold, answer)
    ]
    if not all(parsed):
        return False
    return math_verify.verify(
        *parsed,
        float_rounding=30,
        numeric_precision=40,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )


def warm_up() -> None:
    """Fill the caches of the parser and of sympy, once per server, for all of its children."""
    for pair in _WARM_UP:
        compare(*pair)


def _same_side(gold: str, answer: str) -> tuple[str, str]:
    """Drop ``x =`` or ``x in`` where only one side has it, or where both have the same."""
    sides = []
    for text, other in ((gold, answer), (answer, gold)):
        name, mark, value = re.sub(r"\\in(?![A-Za-z])", "=", text, count=1).partition("=")
        own = mark and _NAME.fullmatch(name) and "=" not in value and value.strip()
        alone = not re.search(r"=|\\in(?![A-Za-z])", other)
        both = other.replace(" ", "").startswith(f"{name.replace(' ', '')}=")
        sides.append(value.strip() if own and (alone or both) else text)
    return sides[0], sides[1]


def _percent(text: str, unit: str) -> tuple[str, bool]:
    if text.endswith("%"):
        return text[:-1].rstrip("\\ "), True
    return text, unit == "%"


def _items(text: str) -> int:
    """Entries of a list: commas outside all brackets, or inside the outermost pair."""
    depths, depth = [], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == ",":
            depths.append(depth)
    return depths.count(min(depths)) + 1 if depths else 1


def _is_tuple(text: str) -> bool:
    """Whether one pair of brackets encloses a list: a point, or an interval."""
    if not text.startswith(("(", "[")) or not text.endswith((")", "]")) or "," not in text:
        return False
    depth = 0
    for c in text[:-1]:
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return False
    return True


def _solved(answer: str) -> bool:
    """Whether exactly one part between relation signs is a name, and the others have none."""
    if "," in answer or " or " in answer or " and " in answer:
        return False
    parts = _RELATION.split(answer)
    names = [bool(_NAME.fullmatch(part)) for part in parts]
    free = [not re.search("[A-Za-z]", _COMMAND.sub("", part)) for part in parts]
    return names.count(True) == 1 and all(n or f for n, f in zip(names, free, strict=True))
