r"""Mathematical answers as text: the last ``\boxed{}``, one notation, literal numbers, words."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_ANSWER_CHARS = 300
_SYMBOLS = {
    "-": "−–‒‐‑", " ": "\u00a0\u202f\u2009\u2002\u2003", "/": "∕⁄", "*": "∗", ":": "∶", "'": "′’",
    "''": "″", r"\times ": "×", r"\cdot ": "·⋅∙", r"\div ": "÷", r"\pm ": "±", r"\mp ": "∓",
    r"\le ": "≤⩽", r"\ge ": "≥⩾", r"\ne ": "≠", r"\infty ": "∞", r"^\circ ": "°º", r"\in ": "∈",
    r"\cup ": "∪", r"\cap ": "∩", r"\setminus ": "∖", r"\emptyset ": "∅", r"\angle ": "∠",
    r"\triangle ": "△", r"\langle ": "⟨", r"\rangle ": "⟩", r"\lfloor ": "⌊", r"\rfloor ": "⌋",
    r"\lceil ": "⌈", r"\rceil ": "⌉", r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ", r"\mathbb{N}": "ℕ",
    r"\mathbb{Q}": "ℚ", r"\mathbb{C}": "ℂ", r"\text{euro}": "€", r"\text{gbp}": "£",
    r"\lambda ": "λ", r"\Lambda ": "Λ", r"\sqrt[3]": "∛",
}  # fmt: skip
_UNICODE = {ord(c): latex for latex, characters in _SYMBOLS.items() for c in characters}
for _c in "αβγδεζηθικμνξπρστυφχψωΓΔΘΞΠΣΥΦΨΩ":
    _name = unicodedata.name(_c).rpartition(" ")[2]
    _UNICODE[ord(_c)] = f"\\{_name.capitalize() if _c.isupper() else _name.lower()} "
for _c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒":
    _UNICODE[ord(_c)] = r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", _c).split("⁄"))
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_LINE = str.maketrans(_RAISED + _LOWERED, 2 * "0123456789+-n")
_COMMANDS = {
    command: latex
    for latex, commands in {
        "": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits "
        "large Large bf rm", r"\{": "lbrace", r"\}": "rbrace",
        r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\le ": "leq leqslant leqq",
        r"\ge ": "geq geqslant geqq", r"\ne ": "neq", "<": "lt", ">": "gt", "'": "prime",
        "|": "lvert rvert vert mid", r"\emptyset ": "varnothing", r"\setminus ": "backslash",
        r"\phi ": "varphi", r"\epsilon ": "varepsilon", r"\theta ": "vartheta",
        r"^\circ ": "degree degrees textdegree",
    }.items()
    for command in commands.split()
}  # fmt: skip
_PROGRAMMED = ("**", "^"), ("<=", r"\le "), (">=", r"\ge "), (r"\not=", r"\ne "), (r"\!", "")
_SPACING = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad\b|~|\s+")
_UPRIGHT = r"\\(?:text(?:bf|it|rm|sf|normal)?|mathrm|operatorname|mbox)\s*"
TEXT = rf"{_UPRIGHT}\{{((?:[^{{}}\\]|\\cdot|\^\{{-?\d\}})*)\}}"
_PUNCTUATION = r"\\text ?\{ ?([,;.]?) ?\}"
_CALLED = r"ln|log|(?:arc)?(?:sin|cos|tan)|exp"
_FUNCTION = re.compile(rf"{_UPRIGHT}\{{({_CALLED})\}}")
_WORDS = re.compile(rf"(?<![A-Za-z\\{{])(sqrt|pi|{_CALLED})(?![A-Za-z])")  # 2sqrt(3)
_ARRAY = re.compile(r"[\[(]\\begin\{array\}\{[lcr]+\}(.*)\\end\{array\}[\])]")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}| )\d{3})+(?!\d)")
_PLAIN = re.compile(rf"({_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?")
_TIMES = re.compile(rf"({_DECIMAL})(?:\\times|\\cdot|\*)\{{?10\}}?\^[{{(]?([+-]?\d{{1,3}})[}})]?")
_SLASH = re.compile(rf"(?:(\d+) )?([+-]?{_DECIMAL})/([+-]?{_DECIMAL})")
_ARGUMENT = rf"(?:\{{([+-]?{_DECIMAL})\}}|(\d))"
_FRAC = re.compile(rf"(\d*)\\frac{_ARGUMENT}{_ARGUMENT}")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))")


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
    """One notation for what can be written in many; None for no answer: too long, or odd."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_LINE)}}}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda m: f"_{{{m[0].translate(_LINE)}}}", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z]|)", lambda m: r"\sqrt" + (m[1] and f"{{{m[1]}}}"), text)
    text = text.translate(_UNICODE)
    if not all(c.isascii() and (c.isprintable() or c in "\n\t") for c in text):
        return None
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = re.sub(r"\^\s*\{\s*\^?\\circ\s*\}", r"^\\circ ", text)
    text = re.sub(r"\^\s*(?:\{\s*('+)\s*\}|('))", r"\1\2", text)
    text = re.sub(r"_\s*\{\s*(\w)\s*\}", r"_\1", text)
    for old, new in _PROGRAMMED:
        text = text.replace(old, new)
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # mathematics, no currency
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"\\(?:mathrm|operatorname)\{([ei])\}", r"\1", _SPACING.sub(" ", text))
    text = re.sub(r"\\mathbb ?([A-Z])", r"\\mathbb{\1}", re.sub(_PUNCTUATION, r"\1 ", text))
    text = re.sub(rf"{_UPRIGHT}\{{ ?({TEXT}) ?\}}", r"\1", _FUNCTION.sub(r"\\\1", text))
    text = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", _WORDS.sub(r"\\\1 ", text))
    text = re.sub(" +", " ", text).strip()
    text = re.sub(r" ?(?:(?<![.,;])[.,;]|\\\\)$", "", text)
    wrapped = re.fullmatch(rf"{TEXT}|\\(?:mathbf|boldsymbol|bm)\{{([^{{}}]*)\}}", text)
    if wrapped and re.search(r"[\d,]", inner := wrapped[1] or wrapped[2] or ""):
        text = inner.strip()
    return _GROUPS.sub(lambda m: re.sub(r"\{,\}| ", "", m[0]), text.replace(" {,}", "{,}")) or None


def words(text: str) -> str | None:
    r"""An answer in words (``no``, ``\text{B}``), in lower case; None for one in symbols."""
    text = text.strip("() ")
    wrapped = re.fullmatch(TEXT, text)
    plain = (wrapped[1] if wrapped else text).strip(" ().")
    if not re.fullmatch("[A-Za-z][A-Za-z' -]*", plain):
        return None
    bare = not wrapped and not re.search("[A-Za-z]{3}", plain) and plain.lower() != "no"
    return None if bare else " ".join(plain.lower().split())  # xy is a product


def number(text: str) -> Fraction | None:
    """Exact value of a literal number; None for anything that must be computed first.

    Literals are integers, decimals (with thousands separators, an exponent, or repeating digits),
    fractions of them, and mixed numbers.
    """
    text = re.sub(r"(?<![\d,]) | (?!\d)", "", repeating(text))
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-" if sign < 0 else "+")
    whole: str | None = ""
    if match := _PLAIN.fullmatch(text) or _TIMES.fullmatch(text):
        value: Fraction | None = _decimal(match[1]) * Fraction(10) ** int(match[2] or 0)
    elif match := _SLASH.fullmatch(text):
        whole, value = match[1], _ratio(match[2], match[3])
    elif match := _FRAC.fullmatch(text):
        whole, value = match[1], _ratio(match[2] or match[3], match[4] or match[5])
    else:
        return None
    if whole and value is not None:
        value = value + int(whole) if 0 <= value < 1 else None
    return None if value is None else sign * value


def repeating(text: str) -> str:
    r"""The text with fractions for decimals that repeat: ``0.\overline{3}``, ``0.(3)``."""

    def fraction(match: re.Match) -> str:
        whole, fixed, period = match[1] or "0", match[2], match[3] or match[4] or match[5]
        value = int(whole + fixed) + Fraction(int(period), 10 ** len(period) - 1)
        above, below = (value / 10 ** len(fixed)).as_integer_ratio()
        return rf"\frac{{{above}}}{{{below}}}"

    return _REPEATING.sub(fraction, text)


def _decimal(digits: str) -> Fraction:
    sign = -1 if digits.startswith("-") else 1
    return sign * Fraction(digits.lstrip("+-").replace(",", "").removesuffix("."))


def _ratio(above: str, below: str) -> Fraction | None:
    divisor = _decimal(below)
    return _decimal(above) / divisor if divisor else None
