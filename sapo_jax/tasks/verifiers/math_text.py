r"""Mathematical answers as text: the last ``\boxed{}``, its normal form, and exact numbers."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 300
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "°": r"^\circ ", "∪": r"\cup ",
        "±": r"\pm ", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
    }
)  # fmt: skip
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad\b|~")
_IGNORED = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|operatorname|mbox)\s*\{([^{}\\]*)\}")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}| )\d{3})+(?![\d.])")
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?")
_TIMES = re.compile(rf"([+-]?)({_DECIMAL})(?:\\times|\\cdot|\*)10\^\{{?([+-]?\d{{1,3}})\}}?")
_SLASH = re.compile(rf"([+-]?)([+-]?{_DECIMAL})/([+-]?{_DECIMAL})")
_FRAC = re.compile(
    rf"([+-]?)(\d*)\\frac(?:\{{([+-]?{_DECIMAL})\}}|(\d))(?:\{{([+-]?{_DECIMAL})\}}|(\d))"
)
_UNIT = re.compile(r"(?<=[\d})])\s*(\^\{?\\circ\}?|(?<=\s)[A-Za-z]{2,}(?:\^\{?[23]\}?)?)$")
_TEXT_UNIT = re.compile(rf"{_TEXT.pattern}\s*(\^\{{?[23]\}}?)?$")
_NO_UNIT = {
    "or", "and", "not", "is", "if", "to", "mod", "base", "pi",
    "hundred", "thousand", "million", "billion", "trillion", "dozen",
}  # fmt: skip
_ALIASES = {
    alias: unit
    for unit, aliases in {
        "deg": r"^\circ ^{\circ} degree",
        "cm": "centimeter centimetre",
        "m": "meter metre",
        "km": "kilometer kilometre",
        "mm": "millimeter millimetre",
        "in": "inch inche",
        "ft": "foot feet",
        "kg": "kilogram",
        "g": "gram",
        "l": "liter litre",
        "h": "hour hr",
        "min": "minute",
        "s": "second sec",
        "$": "dollar usd",
        "%": "percent",
    }.items()
    for alias in aliases.split()
}


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, with balanced braces; None without one, or unclosed.

    An unclosed last box is a truncated answer, even where an earlier box is closed.
    """
    start = text.rfind(r"\boxed")
    if start < 0:
        return None
    begin = start + len(r"\boxed")
    begin += len(text[begin:]) - len(text[begin:].lstrip(" "))
    if text[begin : begin + 1] != "{":
        return None
    depth, i = 0, begin
    while i < len(text):
        if text[i] == "\\":  # \{ and \} are set braces, no groups
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i].strip()
        i += 1
    return None


def clean(text: str) -> str | None:
    """Normal form of an answer's notation; None for no answer (too long, odd characters)."""
    text = text.translate(_UNICODE).strip()
    if not text or len(text) > MAX_ANSWER_CHARS or not text.isascii() or "\x7f" in text:
        return None
    if any(c < " " and c not in "\n\t" for c in text):
        return None
    text = _SPACING.sub(" ", _IGNORED.sub("", re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)))
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
        if len(text) > 1 and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    if (wrapped := _TEXT.fullmatch(text)) and re.search(r"\d", wrapped[1]):
        text = wrapped[1].strip()
    text = re.sub(r"\\degrees?(?![A-Za-z])", r"^\\circ", text)
    text = _GROUPS.sub(lambda m: re.sub(r"\{,\}| ", "", m[0]), text.replace(" {,}", "{,}"))
    return text or None


def split_unit(text: str) -> tuple[str, str]:
    """A cleaned answer without its trailing unit (or leading currency), and the unit's name."""
    if text.startswith((r"\$", "$")):
        return text.lstrip("\\").removeprefix("$").strip(), "$"
    match = _TEXT_UNIT.search(text) or _UNIT.search(text)
    if not match or not match.start():
        return text, ""
    words = match[1].lower().replace(".", " ").split()
    if not words or len(words) > 3 or not _NO_UNIT.isdisjoint(words):
        return text, ""
    power = (match[2] if match.re is _TEXT_UNIT else "") or ""
    name, mark, exponent = (" ".join(words) + power).partition("^") if words else ("", "", "")
    name = name.strip() if name else mark + exponent
    singular = name if len(name) < 3 else name.removesuffix("s")
    unit = _ALIASES.get(singular, singular)
    if name != mark + exponent and exponent:
        unit += "^" + exponent.strip("{}")
    return text[: match.start()].strip(), unit


def letters(text: str) -> str | None:
    r"""The lower-case words of an answer of letters alone, ``\text{}`` and brackets removed."""
    plain = _TEXT.sub(r"\1", text).strip(" ()")
    return " ".join(plain.lower().split()) if re.fullmatch("[A-Za-z][A-Za-z' -]*", plain) else None


def is_words(text: str) -> bool:
    r"""Whether an answer is words (``no``, ``\text{B}``, ``(B)``), and no bare variable."""
    return letters(text) is not None and len(text) > 1


def number(text: str) -> Fraction | None:
    """Exact value of a literal number; None for anything that must be computed first.

    Literals are integers, decimals (with thousands separators, or an exponent), fractions of
    them, and mixed numbers.
    """
    text = text.replace(" ", "")
    if match := _PLAIN.fullmatch(text) or _TIMES.fullmatch(text):
        sign, digits, exponent = match.groups()
        value = _decimal(digits) * Fraction(10) ** int(exponent or 0)
    elif match := _SLASH.fullmatch(text):
        sign, above, below = match.groups()
        value = _ratio(above, below)
    elif match := _FRAC.fullmatch(text):
        sign, whole, above, above_1, below, below_1 = match.groups()
        value = _ratio(above or above_1, below or below_1)
        if whole and value is not None:
            value = value + int(whole) if 0 <= value < 1 else None
    else:
        return None
    return None if value is None else -value if sign == "-" else value


def exact_decimals(text: str) -> str:
    """The text with decimals as fractions, so that nothing is compared after rounding."""

    def fraction(match: re.Match) -> str:
        value = _decimal(match[0])
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    return re.sub(r"(?<![\d.])(?:\d+\.\d+|\.\d+)(?![\d.])", fraction, text)


def _decimal(digits: str) -> Fraction:
    sign = -1 if digits.startswith("-") else 1
    return sign * Fraction(digits.lstrip("+-").replace(",", "").removesuffix("."))


def _ratio(above: str, below: str) -> Fraction | None:
    divisor = _decimal(below)
    return _decimal(above) / divisor if divisor else None
