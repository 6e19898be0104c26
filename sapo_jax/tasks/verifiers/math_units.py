r"""Units of mathematical answers: known ones, and plural nouns for what is counted."""

from __future__ import annotations

import re
from collections import Counter

from sapo_jax.tasks.verifiers.math_text import TEXT

Unit = tuple[tuple[str, int], ...]  # names with their powers, in order; () for none

PERCENT: Unit = (("%", 1),)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
_TEXT_TAIL = re.compile(rf"\s*(?:\^\\circ ?)?(?:{TEXT}{_POWER}|\s|\\cdot|[/*])+$")
_BARE_TAIL = re.compile(rf"(?<=[\d)}}])(\s*)([A-Za-z]+{_POWER}(?:\s*[ /*]\s*[A-Za-z]+{_POWER})*)$")
_SIGN_TAIL = re.compile(r"\s*(\\?%|\\?\$|\^\\circ\s*[CF]?)\s*$")
_DEGREES = re.compile(r"\^\\circ(?!\s*(?:[CF]|\\(?:text|mathrm)))\s*")
_ANGULAR = re.compile(r"\\(?:pi|arc|sin|cos|tan|cot|sec|csc)")  # sin 20 is not sin 20°
_CURRENCY = re.compile(r"(-?)\s*(?:\\?\$|\\text\{(euro|gbp)\})\s*")
_QUOTIENT = re.compile(rf"\\frac\s*\{{\s*({TEXT})\s*\}}\s*\{{\s*({TEXT}{_POWER})\s*\}}")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_UNITS = {
    alias: unit
    for unit, aliases in {
        "deg": r"degree ^\circ", "degC": r"^\circC", "degF": r"^\circF", "rad": "radian",
        "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "mm": "millimeter millimetre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
        "mi": "mile", "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound",
        "oz": "ounce", "L": "l liter litre", "ml": "milliliter millilitre", "gal": "gallon",
        "h": "hour hr", "min": "minute", "s": "second sec", "day": "", "week": "", "month": "",
        "year": "yr", "$": r"\$ dollar usd", "cent": "", "euro": "eur", "gbp": "", "N": "newton",
        "%": r"\% percent pct", "J": "joule", "W": "watt", "V": "volt", "hz": "hertz", "way": "",
        "mi/h": "mph", "km/h": "kph kmh", "person": "people", "child": "children", "unit": "",
        "cup": "", "acre": "", "ton": "tonne",
    }.items()
    for alias in (unit, *aliases.split())
}  # fmt: skip
_NO_PRODUCTS = {"cm", "mm", "km", "kg", "ft", "yd", "mi", "lb", "oz", "ml", "hr", "hz"}
_NO_NOUNS = re.compile(  # numerals, and words that end like a plural
    "(?:zero|one|two|three|four|five|sixe?|seven|eight|nine|ten|eleven|twelve)s|"
    "(?:twen|thir|four?|fif|six|seven|eigh|nine)(?:teen|tie)s|"
    "(?:hundred|thousand|myriad|.*illion|dozen|grosse|score|googol|lakh|crore)s|"
    "(?:half|halve|third|quarter|time|percentage|permille)s|.*(?:ss|us|is|as|ths)"
)


def split_unit(text: str, *, spaced: bool = False, expected: Unit = ()) -> tuple[str, Unit]:
    r"""A value without its unit, and the unit; () where it has none that is known.

    A bare letter is a variable, and so are letters that may be a product (``2mg``), unless they are
    the unit that is expected.

    Args:
      text: cleaned, as ``17 m/s``, ``5\text{ cm}^2``, ``\$3``.
      spaced: a bare unit must stand behind a space.
      expected: the unit of the other answer.
    """
    text = _QUOTIENT.sub(r"\1/\3", text)
    if match := _CURRENCY.match(text):
        return match[1] + text[match.end() :], ((match[2] or "$", 1),)
    if match := _DEGREES.search(text):
        return (text, ()) if _ANGULAR.search(text) else (_DEGREES.sub("", text), _parse(match[0]))
    if match := _SIGN_TAIL.search(text):
        return text[: match.start()], _parse(match[1])
    match = _TEXT_TAIL.search(text)
    if match and match.start() and "{" in match[0]:
        unit = _parse(re.sub(TEXT, r"\1", match[0]).replace(r"\cdot", "*"))
        computed = unit == (("deg", 1),) and _ANGULAR.search(text)
        return (text[: match.start()], unit) if unit and not computed else (text, ())
    match = _BARE_TAIL.search(text)
    if not match or _VARIABLE.search(text[: match.start()]):
        return text, ()
    unit, first = _parse(match[2]), re.findall("[A-Za-z]+", match[2])
    clear = max(map(len, first)) > 2 or "/" in match[2] or first[0].lower() in _NO_PRODUCTS
    if unit and ((clear and (match[1] or not spaced)) or unit == expected):
        return text[: match.start()], unit
    return text, ()


def _parse(text: str) -> Unit:
    """The powers of the units in a text such as ``miles per hour``; () where one is none."""
    text = re.sub(r"[{}$]", "", text) if len(text) > 2 else text
    text = re.sub(r"\bper\b", "/", text.strip().rstrip("."))
    text = re.sub(
        r"\bdegrees? ([cCfF])(?:elsius|ahrenheit)\b", lambda m: f"deg{m[1].upper()}", text
    )
    text = re.sub(r"\b(?:sq|square)\.? +([A-Za-z]+)| +squared", r"\1^2", text)
    text = re.sub(r"\b(?:cu|cubic)\.? +([A-Za-z]+)| +cubed", r"\1^3", text)
    powers: Counter[str] = Counter()
    sign = 1
    for part in re.findall(r"\^\\circ ?[CF]?|\\?[A-Za-z%$]+(?:\s*\^\s*-?\d)?|\S", text):
        if part in "/*":
            sign = -1 if part == "/" else sign
            continue
        name, _, power = (part, "", "") if part[0] == "^" else part.partition("^")
        unit = _known(name.replace(" ", ""))
        if not unit:
            return ()
        for atom, direction in zip(unit.split("/"), (1, -1), strict=False):
            powers[atom] += direction * sign * int(power or 1)
    return tuple(sorted(powers.items()))


def _known(name: str) -> str:
    """The usual name of a unit, or of things that are counted; "" where it is neither."""
    if len(name) == 1 or name in _UNITS:
        return _UNITS.get(name, "")
    singular = name.lower().removesuffix("s")
    if singular in _UNITS and len(singular) > 1:
        return _UNITS[singular]
    plural = name.islower() and len(name) > 3 and name.endswith("s")
    return singular if plural and not _NO_NOUNS.fullmatch(name) else ""
