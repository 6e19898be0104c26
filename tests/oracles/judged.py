"""The labelled answers of ``math_answers.txt``, for the tests and for docs/judging.md."""

import pathlib
from collections.abc import Iterator

PATH = pathlib.Path(__file__).with_name("math_answers.txt")


def pairs() -> Iterator[tuple[str, str, str, str]]:
    """Kind, verdict (right, wrong, one way, missed), reference and answer of each pair."""
    kind = ""
    for line in PATH.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ")
        elif not line.startswith("#"):
            verdict, gold, *answers = line.split(" ;; ")
            yield from ((kind, verdict, gold, answer) for answer in answers)
