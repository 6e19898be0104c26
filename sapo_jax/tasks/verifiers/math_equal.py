r"""Whether two mathematical answers are the same: each is read as what it is, and compared as that.

What cannot be read is right only where it is the reference itself, up to notation: when in doubt,
an answer is refused.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from sapo_jax.tasks.verifiers.math_numbers import Budget, UnreadableError
from sapo_jax.tasks.verifiers.math_read import (
    THOUSANDS,
    Answer,
    asks_for_sum,
    read,
    region,
    squeezed,
)
from sapo_jax.tasks.verifiers.math_text import clean, number, repeating
from sapo_jax.tasks.verifiers.math_units import PERCENT, split_unit
from sapo_jax.tasks.verifiers.math_values import equal, order, proportional


def same(gold: str, answer: str) -> bool:
    """Whether an answer is right.

    - A literal number must be answered by a literal number of the same exact value: the question
      boxed again (``17*23``) earns nothing, nor does a rounded value.
    - A missing unit or name (``x =``) passes, another fails. With a percent sign on one side only,
      both its readings pass (10% is 10, or 0.1), but 0.5 is not 0.5%.
    - Words are compared as words, all else by value; see ``math_values.equal``.

    Args:
      gold: the reference answer.
      answer: what was in the box.
    """
    left, right = clean(gold), clean(answer)
    if not left or not right:
        return False
    if squeezed(left) == squeezed(right):
        return True
    budget = Budget()
    try:
        return _same(read(left, budget), read(right, budget), budget)
    except (UnreadableError, ArithmeticError, RecursionError):
        return False


def _same(gold: Answer, answer: Answer, budget: Budget) -> bool:
    kinds = {gold.kind, answer.kind}
    if "equation" in kinds:
        return _equations(gold, answer, budget)
    if "choice" in kinds:
        return _choices(gold, answer, budget)
    if gold.name and answer.name and gold.name != answer.name:
        return False
    if "named" in kinds:
        return _named(gold, answer, budget)
    if "words" in kinds:
        letters = _letter(gold), _letter(answer)
        if len(kinds) == 1:
            return gold.text == answer.text
        return bool(letters[0]) and letters[0].lower() == letters[1].lower()
    if "region" in kinds:
        return _regions(gold, answer, budget)
    if kinds <= {"list", "set"} or kinds == {"set", "value"}:
        several = ({"value": (a,)}.get(a.kind, a.items) for a in (gold, answer))
        return _unordered(*several, budget)
    if len(kinds) > 1 or (gold.kind != "value" and gold.text != answer.text):
        return False
    if gold.kind == "tuple":
        return _ordered(gold.items, answer.items, budget)
    if gold.kind == "inequality":
        both = (f"({left})-({right})" for left, right in (gold.items, answer.items))
        return proportional(*both, budget, positive=gold.text != r"\ne")
    return _values(gold.text, answer.text, budget)


def _ordered(golds: tuple, answers: tuple, budget: Budget) -> bool:
    pairs = zip(golds, answers, strict=False)
    return len(golds) == len(answers) and all(_same(g, a, budget) for g, a in pairs)


def _unordered(golds: tuple, answers: tuple, budget: Budget) -> bool:
    left = list(answers)
    for gold in golds:
        for i, answer in enumerate(left):
            if _may_be(gold, answer, budget):
                del left[i]
                break
    return len(golds) == len(answers) and not left


def _may_be(gold: Answer, answer: Answer, budget: Budget) -> bool:
    try:
        return _same(gold, answer, budget)
    except UnreadableError:
        return False


def _equations(gold: Answer, answer: Answer, budget: Budget) -> bool:
    if gold.kind != "equation":  # m+n=113 is 113, but an equation to be solved is no solution
        left, right = answer.items
        stated = asks_for_sum(left) and not gold.name and number(right) != 0
        return stated and _same(gold, read(right, budget), budget)
    left, right = gold.items
    if answer.kind == "equation":
        other, value = answer.items
    elif answer.name:
        if answer.kind != "value":
            return False
        other, value = answer.name, answer.text
    else:  # not the 4 of x^2+y^2=4
        stated = asks_for_sum(left) and not re.search(r"[xyz^]", left)
        return stated and _same(read(right, budget), answer, budget)
    if squeezed(left) == squeezed(other):
        return _same(read(right, budget), read(value, budget), budget)
    return proportional(f"({left})-({right})", f"({other})-({value})", budget)


def _choices(gold: Answer, answer: Answer, budget: Budget) -> bool:
    letters = _letter(gold), _letter(answer)
    if all(letters) and letters[0] != letters[1]:
        return False
    values = [a.items[0] if a.kind == "choice" else a for a in (gold, answer)]
    bare = [a for a in (gold, answer) if a.kind != "choice" and _letter(a)]
    return bool(bare) or _same(*values, budget)


def _named(gold: Answer, answer: Answer, budget: Budget) -> bool:
    if gold.kind == answer.kind:
        golds, answers = (sorted(a.items, key=lambda item: item.name) for a in (gold, answer))
        return [i.name for i in golds] == [i.name for i in answers] and _ordered(
            tuple(golds), tuple(answers), budget
        )
    named, other = (gold, answer) if gold.kind == "named" else (answer, gold)
    if other.name or other.text not in ("", "()") or other.kind not in ("list", "set", "tuple"):
        return False
    names = [item.name.replace("\\", "~") for item in named.items]  # Greek behind Latin
    golds, answers = (tuple(replace(i, name="") for i in a.items) for a in (gold, answer))
    if other is gold and gold.kind != "tuple" and len({n.partition("_")[0] for n in names}) == 1:
        return _unordered(golds, answers, budget)  # x_1 = 1, x_2 = 2
    return other.kind != "set" and names == sorted(names) and _ordered(golds, answers, budget)


def _regions(gold: Answer, answer: Answer, budget: Budget) -> bool:
    regions = region(gold), region(answer)
    if None in regions:
        return False
    ends = [set(r.ends) for r in regions]
    if all(number(end) is not None for end in ends[0]) and None in map(number, ends[1]):
        return False
    compare = functools.partial(order, budget=budget)
    rank, last, before = {r"-\infty": -1e9, r"\infty": 1e9, r"+\infty": 1e9}, 0, ""
    for end in sorted(ends[0] | ends[1], key=functools.cmp_to_key(compare)):
        last += bool(before) and compare(before, end) != 0
        rank[end], before = last, end
    places = (place / 2 for place in range(-1, 2 * last + 2))
    return all(len({r.contains(place, rank) for r in regions}) == 1 for place in places)


def _values(gold: str, answer: str, budget: Budget) -> bool:
    left, unit = split_unit(gold, spaced=True)
    right, other = split_unit(answer, expected=unit)
    if other and not unit:
        left, unit = split_unit(gold, spaced=True, expected=other)
    if unit and other and unit != other:
        return False
    values = number(left), number(right)
    if values[0] is None:
        left, right = (
            THOUSANDS.sub(lambda m: m[0].replace(",", ""), repeating(t)) for t in (left, right)
        )
        return (unit == PERCENT) == (other == PERCENT) and equal(left, right, budget)
    if values[1] is None:
        return False
    exact = [v / 100 if u == PERCENT else v for v, u in zip(values, (unit, other), strict=True)]
    loose = unit == PERCENT or (other == PERCENT and abs(values[0]) >= 1)
    return exact[0] == exact[1] or (loose and values[0] == values[1])


def _letter(answer: Answer) -> str:
    """The letter that an answer is, or ""."""
    if answer.kind not in ("value", "words", "choice"):
        return ""
    letter = re.fullmatch(r"(?:\\(?:mathbf|boldsymbol) ?\{)?\(?([A-Za-z]{1,2})\)?\}?", answer.text)
    return "" if not letter else letter[1].upper() if answer.kind == "words" else letter[1]
