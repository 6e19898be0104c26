"""Programming problems with tests, in LiveCodeBench's format, judged in a sandbox."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
import pickle
import re
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar

from sapo_jax.tasks.base import Example, check_option, make_example
from sapo_jax.tasks.jsonl import Fields, FileTask
from sapo_jax.tasks.verifiers.sandbox import MODES, Limits, Sandbox, check

TEMPLATE = (
    "{question}\n\nAnswer with a complete Python program in a ```python block. {how}\n{starter}"
)
STDIN = "It reads the input from stdin and prints the output."
FUNCTION = "Complete this code:"
MAX_PROGRAM_CHARS = 1 << 16
# CommonMark's fences, at any depth of a list, and the languages of a block that count.
FENCE = re.compile(r"([ \t]*)(`{3,}(?=[^`]*$)|~{3,})[ \t]*([^\s`]*)")
PYTHON = re.compile(r"(?:\{?\.?(?:python|pypy|py)[\d.]*\}?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """What a program is tested with.

    ``tests``: pairs of input and expected output; for a function, of its arguments and its value.
    """

    function: str
    tests: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Programs(FileTask):
    """A question is answered by a program that passes all of its tests.

    A line has ``question_content``, ``public_test_cases``, and optionally ``question_id``,
    ``private_test_cases``, ``starter_code`` and ``metadata``.

    Args:
      train, test, completion_chars: see ``FileTask``.
      template: the prompt; ``{question}``, ``{how}`` and ``{starter}`` are filled in.
      max_tests: of a problem, the first so many; 0: all.
      seconds: of each test; the first that fails ends the judgement.
      memory_mb: address space.
      isolation: one of ``sandbox.MODES``; a weaker one than the first is never taken unasked.
      sandbox: what ``isolation`` was called; "auto" is "namespaces".
      python: interpreter; "" for the running one.

    Raises:
      ValueError: an option is out of its range.
    """

    template: str = TEMPLATE
    max_tests: int = 0
    seconds: float = 6.0
    memory_mb: int = 1024
    isolation: str = MODES[0]
    sandbox: str = ""
    python: str = ""

    name: ClassVar[str] = "programs"
    _fields: ClassVar[Fields] = {"question_content": str, "public_test_cases": (str, list)}

    def __post_init__(self):
        super().__post_init__()
        check_option("max_tests", self.max_tests, 0)
        check_option("memory_mb", self.memory_mb, 64)
        if not 0 < self.seconds <= 600:
            raise ValueError(f"seconds must be a number in (0, 600], got {self.seconds!r}")
        if self.sandbox:
            isolation = MODES[0] if self.sandbox == "auto" else self.sandbox
            object.__setattr__(self, "isolation", isolation)
        if self.isolation not in MODES:
            raise ValueError(f"isolation must be one of {', '.join(MODES)}, got {self.isolation!r}")

    @functools.cached_property
    def _by_key(self) -> dict[str, Problem]:
        return {e.answer: problem for rows in self._splits.values() for e, problem in rows}

    def _parse(self, row: dict[str, Any], key: str) -> tuple[Example, Problem]:
        problem = parse(row, self.max_tests)
        starter = row.get("starter_code") or ""
        prompt = self.template.replace("{how}", FUNCTION if problem.function else STDIN)
        prompt = prompt.replace("{starter}", f"```python\n{starter}\n```" if starter else "")
        prompt = prompt.replace("{question}", row["question_content"])
        return make_example(prompt.strip(), key, ""), problem

    def start(self) -> None:
        """Try the sandbox, before the first program.

        Raises:
          RuntimeError: the machine does not permit it.
        """
        locks = check(self.isolation, self.python)
        if self.isolation != MODES[0] or "no " in locks:
            print(
                f"programs run with isolation={self.isolation!r} and {locks}: docs/sandbox.md "
                "says what that promises",
                flush=True,
            )

    def verify(self, example: Example, completion: str) -> float:
        """1.0 iff the last code block passes every test of the example."""
        program = last_block(completion)
        if program is None:
            return 0.0
        return float(self.passes(self._by_key[example.answer], program))

    def passes(self, problem: Problem, program: str) -> bool:
        """Whether a program passes every test; the first failure ends it."""
        longest = max(len(json.dumps(expected)) for _, expected in problem.tests)
        limits = Limits(
            seconds=self.seconds,
            memory_mb=self.memory_mb,
            output_bytes=Limits.output_bytes + 2 * longest,
        )
        with Sandbox(
            program,
            function=problem.function,
            limits=limits,
            mode=self.isolation,
            python=self.python,
        ) as sandbox:
            for given, expected in problem.tests:
                result = sandbox.call(*given) if problem.function else sandbox.stdin(given)
                if result.status != "ok":
                    return False
                same = same_value if problem.function else same_output
                if not same(expected, result.output):
                    return False
        return True


def last_block(completion: str) -> str | None:
    """The last fenced block of Python, else without a language; None for none, or one too long."""
    programs: dict[bool, str] = {}
    block, fence = [], None
    for line in re.split(r"\r\n|\r|\n", completion):
        found = FENCE.match(line)
        if fence is None:
            if found:
                block, fence = [], found
        elif found and found[2].startswith(fence[2]) and line.strip() == found[2]:
            if PYTHON.fullmatch(fence[3]):
                programs[bool(fence[3])] = "".join(part + "\n" for part in block)
            fence = None
        else:
            indent = len(line) - len(line.lstrip(" \t"))
            block.append(line[min(indent, len(fence[1])) :])
    program = programs.get(True, programs.get(False))
    return program if program is None or len(program) <= MAX_PROGRAM_CHARS else None


def same_output(expected: str, found: str) -> bool:
    """Equal line by line, without outer blanks; lines that differ may be equal as numbers."""
    left, right = (text.strip().split("\n") for text in (expected, found))
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if a.strip() == b.strip():
            continue
        x, y = a.split(), b.split()
        if len(x) != len(y) or not all(map(_same_number, x, y)):
            return False
    return True


def _same_number(a: str, b: str) -> bool:
    if a == b:
        return True
    if max(len(a), len(b)) > 400 or not re.search(r"[.eE]", a + b):  # 0101 may be no number
        return False
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def same_value(expected: Any, found: str) -> bool:
    """Equal as JSON values: lists and tuples are one, true is not 1, and 2 is 2.0."""
    try:
        return _typed(expected) == _typed(json.loads(found))
    except (ValueError, RecursionError):
        return False


def _typed(value: Any) -> Any:
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return value


def parse(row: dict[str, Any], max_tests: int = 0) -> Problem:
    """The tests of a line.

    Raises:
      ValueError: they are missing or broken, or a function has no name.
    """
    cases = [*_cases(row, "public_test_cases"), *_cases(row, "private_test_cases")]
    if not cases:
        raise ValueError("no tests")
    metadata = row.get("metadata") or "{}"
    metadata = _json(metadata, "metadata") if isinstance(metadata, str) else metadata
    kinds = {case.get("testtype", "stdin") for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(f"testtype must be stdin or functional, got {sorted(map(str, kinds))}")
    function = metadata.get("func_name", "") if kinds == {"functional"} else ""
    if kinds == {"functional"} and not str(function).isidentifier():
        raise ValueError(f"metadata.func_name must name the function, got {function!r}")
    cases = cases[: max_tests or None]
    if not function:
        return Problem("", tuple((case["input"], case["output"]) for case in cases))
    return Problem(
        function,
        tuple(
            (
                [_json(line, "input") for line in case["input"].split("\n") if line.strip()],
                _json(case["output"], "output"),
            )
            for case in cases
        ),
    )


def _cases(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = row.get(name) or []
    if isinstance(value, str):
        value = _json(value, name) if value.lstrip().startswith("[") else _unpack(value, name)
    strings = isinstance(value, list) and all(
        isinstance(case, dict) and all(isinstance(case.get(k), str) for k in ("input", "output"))
        for case in value
    )
    if not strings:
        raise ValueError(f"{name} must be a list of objects with the strings input and output")
    return value


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


class _Text(pickle.Unpickler):
    """Reads a pickled string: a data file may not name anything to import."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} in a data file")


def _unpack(text: str, name: str) -> Any:
    """LiveCodeBench's private tests: JSON, pickled as a string, compressed, in base 64."""
    try:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
        return json.loads(_Text(io.BytesIO(packed)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"{name} cannot be unpacked: {error}") from None
