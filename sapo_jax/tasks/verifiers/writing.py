"""In which writing systems a text is: whether a completion leaves the language of its prompt."""

from __future__ import annotations

import collections
import re
import unicodedata

LEAST = 0.1  # share of the letters of a prompt whose writing system may be gone on with
# Commands of LaTeX, tags, and Latin letters that stand alone: variables, units.
_MARKUP = re.compile(r"\\[A-Za-z]+|</?[A-Za-z]+>|(?<![^\W\d_])[A-Za-z](?![^\W\d_])")
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")
_KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
# Of names of letters that are symbols in mathematics.
_SYMBOLS = {
    "GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MODIFIER", "SUPERSCRIPT",
    "SUBSCRIPT", "MICRO", "OHM", "KELVIN", "ANGSTROM", "PLANCK", "ALEF", "TURNED", "INFORMATION",
    "MASCULINE", "FEMININE",
}  # fmt: skip


def scripts(text: str) -> collections.Counter[str]:
    """How many letters a text has of each writing system, by the Unicode names of the letters."""
    found: collections.Counter[str] = collections.Counter()
    for letter in filter(str.isalpha, _MARKUP.sub(" ", text)):
        first, *rest = unicodedata.name(letter, "UNKNOWN").replace("CJK COMPAT", "CJK ").split(" ")
        first = rest[0] if first in _WIDTHS else first
        if first not in _SYMBOLS:
            found["KANA" if first in _KANA else first] += 1
    return found


def switching(prompt: str, completion: str) -> float:
    """−(letters of the completion in other writing systems than the prompt's ÷ its letters).

    The prompt's are those of a tenth or more of its letters; with kana, Chinese characters too.
    It is DeepSeek-R1's language consistency (arXiv 2501.12948, §2.3.2) minus 1, by letters. What
    it cannot tell apart are languages of one writing system, such as English and French.

    Returns:
      From −1 to 0; 0 where the prompt or the completion has no letters.
    """
    of_prompt, found = scripts(prompt), scripts(completion)
    least = LEAST * of_prompt.total()
    own = {script for script, count in of_prompt.items() if count >= least}
    own |= {"CJK"} if "KANA" in own else set()
    others = sum(count for script, count in found.items() if script not in own)
    return (0 - others) / found.total() if own and found else 0.0
