r"""What a mathematical answer is: a value, words, a list, a set, a tuple, an equation, …"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from sapo_jax.tasks.verifiers.math_numbers import Budget, UnreadableError
from sapo_jax.tasks.verifiers.math_text import number, words
from sapo_jax.tasks.verifiers.math_values import equal

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end"}
_WORD = r"(?:\\text\{[,;]?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![a-z]))"
_LIST = re.compile(rf"\s*(?:[,;]\s*{_WORD}?|{_WORD})\s*")
_COMMA, _EQUALS, _COLON = (re.compile(c) for c in ("[,;]", "=", ":"))
INFINITE = {r"\infty", r"+\infty", r"-\infty"}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_OPEN_TERM = re.compile(  # a letter but e, or a command that may stand for one
    r"(?<![\\A-Za-z])(?:[A-Za-df-z]|e[_'])|"
    r"\\(?!pi|frac|sqrt|cdot|times|div|infty|ln|log|circ)[A-Za-z]+"
)
VARIABLE = r"(?:[A-Za-z]|\\(?!l?not|neg|cdot)[A-Za-z]++)(?:_(?:\w|\{[^{}]*\}))?'*"
_NESTED = r"(?:[^()]|\([^()]*\))"
_SOLVED_FOR = r"\\(?:ln|lg|log|exp|sqrt|arc|(?:sin|cos|tan)\^)"  # ln(x)=7 names no value of x
_CALL = rf"(?!{_SOLVED_FOR}){VARIABLE}(?:\^\{{-1\}})?\({_NESTED}*\)"
_NAME = re.compile(  # of one thing: x, f(2), E[X], \angle ABC, AB, |AB|, [ABC], \cos\theta, words
    rf"{VARIABLE}|{_CALL}|(?:P|E|Var|\\mathbb\{{E\}})\[{_NESTED}*\]|"
    r"m?\\(?:angle|triangle) ?\{?[A-Z]{1,3}\}?|[A-Z]{2,4}|\|[A-Z]{1,2}\||\[[A-Z]{3,5}\]|"
    r"\\(?:overline|bar|hat|vec)\{\w{1,2}\}|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}|\\frac\{d\w?\}\{d\w\}|"
    rf"\\(?:sin|cos|tan|max|min) ?{VARIABLE}|\\(?:text|mathrm)\{{[A-Za-z ]+\}}"
)
_PRODUCT = re.compile(r"([a-ei-or-zA-EI-OR-Z])\(.*(?:\1|[a-z][+-]|[+-][a-z]).*\)")  # x(x-1), a(b+c)
_NEGATION = re.compile(r"\b(?:not?|never|wrong|except|without|false|n?either|nor)\b", re.IGNORECASE)
_TERM = rf"(?:{VARIABLE}(?:\^\d)?(?:\\cdot)?)+"
_SUM = re.compile(rf"{_TERM}(?:[+-]{_TERM})*")
_BOLD = r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf)\s*\{\s*"
_CHOICE = re.compile(
    rf"(?:{_BOLD}\(([A-Z])\)\s*\}}|\({_BOLD}([A-Z])\s*\}}\)|\(([A-E])\)(?= ?[\d.\\$-]))[\s:.]*"
)
_NUMERAL = re.compile(r"(\d[\dA-Za-z]*)_(?:\{\s*(\d+)\s*\}|(\d+))")
_BUILDER = re.compile(rf"({VARIABLE}) ?(?:\\in ?\\mathbb\{{R\}} ?)?[:|](.*)")  # {x : x > 1}
_MATRIX = re.compile(r"\\begin\{([pb]?matrix)\}(.*)\\end\{\1\}")


@dataclass(frozen=True)
class Answer:
    """An answer that was read."""

    kind: str
    text: str = ""  # of a value, words or a choice; the brackets of a tuple
    items: tuple = ()
    name: str = ""  # x, of x=3


class Region(NamedTuple):
    """A set of real numbers."""

    ends: tuple[str, ...]  # the finite expressions at which it may begin or end
    contains: Callable[[float, Mapping[str, float]], bool]  # of a place among the ends' ranks


def squeezed(text: str) -> str:
    """A text without the spaces that mean nothing."""
    kept = r"\\[A-Za-z]+ (?=[A-Za-z])|(?<=\d) (?=\d)|, (?=\d{3}(?!\d))"
    return re.sub(rf"({kept})| ", lambda m: m[1] or "", text)


def asks_for_sum(text: str) -> bool:
    """Whether a text is ``m+n`` or the like, so that ``m+n=113`` states a value."""
    text = squeezed(text)
    return bool(_SUM.fullmatch(text)) and len(set(re.findall(VARIABLE, text))) > 1


def read(text: str, budget: Budget) -> Answer:
    """What a cleaned answer is.

    Raises:
      UnreadableError: nothing that can be compared.
    """
    budget.spend(1)
    text = text.strip()
    if number(text) is not None:
        return Answer("value", text)
    if (choice := _CHOICE.match(text)) and choice.end() < len(text):
        value = read(text[choice.end() :], budget)
        if value.kind != "value":
            raise UnreadableError("words behind a choice")
        return Answer("choice", choice[1] or choice[2] or choice[3], (value,))
    if (in_words := words(text)) is not None:
        return Answer("words", in_words)
    for pattern, rule in _RULES:
        parts, separators = _split(text, pattern)
        if separators:
            return rule(parts, separators, budget)
    if text.count(r"\pm") == 1 and not text.startswith(r"\{"):
        signs = ("+", "-"), ("-", "+")
        both = (text.replace(r"\pm", a).replace(r"\mp", b) for a, b in signs)
        return Answer("list", items=tuple(read(t, budget) for t in both))
    if enclosed := _enclosed(text):
        return _brackets(*enclosed, budget)
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
        cells = [tuple(read(cell, budget) for cell in row) for row in rows]
        if all(len(row) == 1 for row in cells):  # a column vector
            return Answer("tuple", "()", tuple(row[0] for row in cells))
        return Answer("tuple", "rows", tuple(Answer("tuple", "row", row) for row in cells))
    if numeral := _NUMERAL.fullmatch(text):
        return Answer("words", f"{numeral[1].lstrip('0').upper()}_{numeral[2] or numeral[3]}")
    parts, separators = _split(text, _COLON)
    if separators:
        if re.fullmatch(r"\d+ ?: ?(?:[2-9]|\d{3,})", text):  # 3:45 may be a time of day
            return Answer("value", text.replace(":", "/"))
        return Answer("tuple", ":", tuple(read(part, budget) for part in parts))
    if text == r"\mathbb{R}":
        return Answer("region", items=_interval(r"-\infty", False, r"\infty", False))
    return Answer("set") if text == r"\emptyset" else Answer("value", text)


def region(answer: Answer) -> Region | None:
    """An answer as a set of real numbers, if it is one."""
    if answer.kind not in ("set", "tuple"):
        return answer.items if answer.kind == "region" else None
    texts = tuple(squeezed(item.text) for item in answer.items if item.kind == "value")
    if len(texts) < len(answer.items):
        return None
    if answer.kind == "set":
        return Region(texts, lambda at, rank: at in (rank[text] for text in texts))
    if len(texts) == 2 and set(answer.text) <= set("()[]"):
        return _interval(texts[0], answer.text[0] == "[", texts[1], answer.text[1] == "]")
    return None


def _interval(low: str, with_low: bool, high: str, with_high: bool) -> Region:
    if (with_low and low in INFINITE) or (with_high and high in INFINITE):
        raise UnreadableError("an infinite end that is in the interval")

    def contains(at: float, rank: Mapping[str, float]) -> bool:
        start, end = rank[low], rank[high]
        return start < at < end or (at == start and with_low) or (at == end and with_high)

    return Region(tuple({low, high} - INFINITE), contains)


def _combined(kind: str, left: Region, right: Region) -> Region:
    def contains(at: float, rank: Mapping[str, float]) -> bool:
        first, second = left.contains(at, rank), right.contains(at, rank)
        if kind in ("or", r"\cup"):
            return first or second
        return first and (second if kind in ("and", r"\cap") else not second)

    return Region(left.ends + right.ends, contains)


def _split(text: str, separator: re.Pattern, thousands: bool = True) -> tuple[list[str], list[str]]:
    """The parts of a text between separators outside of all brackets, and the separators."""
    parts, found, depth, at, start = [], [], 0, 0, 0
    while at < len(text):
        grouped = THOUSANDS.match(text, at) if thousands and not depth else None
        if not grouped and not depth and (match := separator.match(text, at)):
            parts.append(text[start:at].strip())
            found.append(match[0].strip())
            at = start = match.end()
            continue
        token = grouped or _TOKEN.match(text, at)
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        at = token.end()
    if depth:
        raise UnreadableError("brackets do not match")
    return [*parts, text[start:].strip()], found


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """The brackets around a text, and what is in them; None where they enclose less."""
    tokens = _TOKEN.findall(text)
    depth = 0
    for i, token in enumerate(tokens, 1):
        depth += (token in _OPEN) - (token in _CLOSE)
        if not depth:
            whole = 1 < i == len(tokens) and tokens[0] != r"\begin"
            return (tokens[0], "".join(tokens[1:-1]).strip(), token) if whole else None
    return None


def _brackets(opening: str, inner: str, closing: str, budget: Budget) -> Answer:
    if opening == r"\{" and not inner:
        return Answer("set")
    if opening == r"\{" and (builder := _BUILDER.fullmatch(inner)):
        condition = read(builder[2], budget)
        if condition.name != builder[1] or condition.kind not in ("region", "list", "value"):
            raise UnreadableError("the elements of a set")
        return condition
    parts, _ = _split(inner, _COMMA, thousands=False)
    if opening == "{" or (opening + closing == "()" and len(parts) == 1):
        return read(inner, budget)
    items = _flat(parts, budget)
    if opening == r"\{":
        return Answer("set", items=items)
    return Answer("tuple", (opening + closing).replace(r"\langle\rangle", "()"), items)


def _flat(parts: list[str], budget: Budget) -> tuple[Answer, ...]:
    """What the parts of a list are; ±1 gives two."""
    items: list[Answer] = []
    for part in parts:
        item = read(part, budget)
        several = item.kind == "list"
        items += [replace(i, name=item.name) for i in item.items] if several else [item]
    return tuple(items)


def _list(parts: list[str], separators: list[str], budget: Budget) -> Answer:
    items = _flat(parts, budget)
    joined = [word for word in ("and", "or") if all(word in s for s in separators)]
    names = [item.name for item in items]
    of_words = any(i.kind == "words" or re.fullmatch("[A-Z]", i.text) for i in items)
    if (r"\lor" in separators and not all(names)) or ("or" in "".join(separators) and of_words):
        raise UnreadableError("a formula of logic, or a choice that is left open")
    if joined and all(item.kind == "region" for item in items) and len(set(names)) == 1:
        combine = functools.partial(_combined, joined[0])
        return Answer("region", items=functools.reduce(combine, map(region, items)), name=names[0])
    if not any(names[1:]):  # x = 1, 2
        names = names[:1] * len(names)
    if len(set(names)) == 1:
        return Answer("list", items=tuple(replace(i, name="") for i in items), name=names[0])
    if len(set(names)) < len(names) or not all(names) or "or" in "".join(separators):
        raise UnreadableError("names that do not tell values apart")
    return Answer("named", items=items)


def _equation(parts: list[str], separators: list[str], budget: Budget) -> Answer:
    if len(parts) == 2 and not _OPEN_TERM.search(parts[0]) and _OPEN_TERM.search(parts[1]):
        parts = parts[::-1]  # 3=x
    left, *others, right = parts
    name = squeezed(left)
    if _NEGATION.search(left):
        raise UnreadableError("a negation")
    if names := re.fullmatch(rf"\(({VARIABLE}(?:,{VARIABLE})+)\)", name):
        point = read(right, budget)
        if others or point.kind != "tuple" or len(point.items) != name.count(",") + 1:
            raise UnreadableError("names without values")
        named = zip(point.items, names[1].split(","), strict=True)
        return Answer("named", items=tuple(replace(value, name=n) for value, n in named))
    if not _OPEN_TERM.search(left):
        others, name = [left, *others], ""  # 3+4=7
    elif not _NAME.fullmatch(name) or _PRODUCT.fullmatch(name):
        if others:
            raise UnreadableError("a chain of equations")
        return Answer("equation", items=(left, right))
    if not all(equal(right, other, budget) for other in others):
        raise UnreadableError("what is not equal")
    if re.fullmatch(VARIABLE, name) and name in re.findall(VARIABLE, right):
        return Answer("equation", items=(left, right))  # x=2x-7
    value = read(right, budget)
    return value if value.name or value.kind == "equation" else replace(value, name=name)


def _element(parts: list[str], separators: list[str], budget: Budget) -> Answer:
    name = squeezed(parts[0])
    if len(parts) > 2 or not _NAME.fullmatch(name):
        raise UnreadableError("what is in a set")
    return replace(read(parts[1], budget), name=name)


def _relation(parts: list[str], signs: list[str], budget: Budget) -> Answer:
    if signs[0] in (">", r"\ge"):
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    parts = [squeezed(part) for part in parts]
    places = [i for i, p in enumerate(parts) if _OPEN_TERM.search(p)]
    if len(places) != 1 or not re.fullmatch(rf"{VARIABLE}|{_CALL}", parts[places[0]]):
        if len(parts) > 2:
            raise UnreadableError("inequalities")
        return Answer("inequality", signs[0], items=tuple(parts))
    at, name = places[0], parts[places[0]]
    if signs == [r"\ne"]:
        point = Region((end := parts[1 - at],), lambda place, rank: place != rank[end])
        return Answer("region", items=point, name=name)
    if not set(signs) <= {"<", r"\le"} or len(parts) != 2 + (at == 1 and len(signs) == 2):
        raise UnreadableError("inequalities")
    low = (parts[at - 1], signs[at - 1] == r"\le") if at else (r"-\infty", False)
    high = (parts[at + 1], signs[at] == r"\le") if at + 1 < len(parts) else (r"\infty", False)
    return Answer("region", items=_interval(*low, *high), name=name)


def _sets(parts: list[str], signs: list[str], budget: Budget) -> Answer:
    regions = [region(read(part, budget)) for part in parts]
    if None in regions or len(set(signs)) > 1:
        raise UnreadableError("sets of something else")
    return Answer("region", items=functools.reduce(functools.partial(_combined, signs[0]), regions))


_RULES = (
    (_LIST, _list),
    (_EQUALS, _equation),
    (re.compile(r"\\in(?![A-Za-z])"), _element),
    (re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>]"), _relation),
    (re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])"), _sets),
)
