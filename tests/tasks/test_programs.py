"""Programs: LiveCodeBench's format, verdicts, and a sandbox that hostile programs do not leave."""

from __future__ import annotations

import base64
import json
import os
import pickle
import time
import zlib

import pytest

from sapo_jax import rewards, types
from sapo_jax.tasks import make
from sapo_jax.tasks.programs import Programs, last_block, parse, same_output, same_value
from sapo_jax.tasks.verifiers.sandbox import MODES


def case(given, output, kind="stdin"):
    return {"input": given, "output": output, "testtype": kind}


ADD = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("```python\nx\n```", "x\n"),
        ("so\n```py\nx\n```\nor\n```python\ny\n```\nend", "y\n"),
        ("```\nx\n```", "x\n"),
        ("```python\nx\n```\n```json\n{}\n```", "x\n"),
        ("```python\nx\n```\nIt prints\n```\n3\n```", "x\n"),
        ("```\nx\n```\n```\ny\n```\n", "y\n"),
        ("```python\nx", None),
        ("```json\n{}\n```", None),
        ("print(1)", None),
        ("", None),
        ("```python\n" + "x" * 10**6 + "\n```", None),
        ("```python\nx\n```python\ny\n```", "x\n```python\ny\n"),
        ("```" * 10**5, None),
        ("```python\n" * 10**5, None),
        ("```\n" * 10**5, ""),
        ("```python\r\nx\r\ny\r\n```\r\n", "x\ny\n"),
        ("```python\rx\r```\r", "x\n"),
        ("```Python\nx\n```", "x\n"),
        ("```PYTHON3\nx\n```", "x\n"),
        ("```python3.11\nx\n```", "x\n"),
        ("```py3\nx\n```", "x\n"),
        ("``` python\nx\n```", "x\n"),
        ('```python title="a.py"\nx\n```', "x\n"),
        ("```{.python}\nx\n```", "x\n"),
        ("```pythonic\nx\n```", None),
        ("```python-traceback\nx\n```", None),
        ("```c++\nx\n```", None),
        ("````python\nx\n````", "x\n"),
        ("````python\nx\n```\ny\n````", "x\n```\ny\n"),
        ("```python\nx\n````", "x\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("~~~\nx\n```\ny\n~~~", "x\n```\ny\n"),
        ("```python\nx\n~~~\n```", "x\n~~~\n"),
        ("~~~~ py `a`\nx\n~~~\n~~~~", "x\n~~~\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n\n   ```", "if x:\n    y\n\n"),
        ("  ```py\n  x\n ```", "x\n"),
        ("\t```python\n\tx\n\t```", "x\n"),
        ("      ```python\n      x\n      ```", "x\n"),
        (" ```python\nx\n  y\n ```", "x\n y\n"),
        ("It is ```x``` here.\n```python\ny\n```", "y\n"),
        ("```x``` and\n```python\ny\n```", "y\n"),
        ("``\nx\n``", None),
    ],
)
def test_the_last_block_counts(completion, expected):
    start = time.process_time()
    assert last_block(completion) == expected
    assert time.process_time() - start < 0.5


def test_outputs_are_compared_by_line_and_number():
    for a, b in (
        ("1\n", "1"),
        ("1 2\n3", " 1 2 \n3\n\n"),
        ("0.5", "0.50"),
        ("a 1.0", "a 1"),
        ("1e5 -0.0", "100000 0"),
        ("", "\n"),
    ):
        assert same_output(a, b), (a, b)
    assert not same_output("0101", "101")
    assert not same_output("1000", "1_000")
    wrong = (("1", "2"), ("1", "1\n1"), ("1 2", "12"), ("a", "A"), ("1", "1.0000001"), ("", "x"))
    for a, b in (*wrong, ("nan", "NaN x"), ("1", "1e999999999"), ("1", "9" * 10**6)):
        assert not same_output(a, b), (a, b[:9])


def test_values_are_compared_as_json():
    for a, b in (
        ([1, 2], "[1, 2]"),
        (2, "2.0"),
        ("x", '"x"'),
        (None, "null"),
        ({"a": 1}, '{"a": 1}'),
    ):
        assert same_value(a, b)
    for a, b in (
        (True, "1"),
        (1, "true"),
        ([1], "1"),
        (1, "x"),
        (1, ""),
        ([], "[" * 10**5),
        ("1", "1"),
    ):
        assert not same_value(a, b)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def question(name="q", **fields):
    tests = json.dumps([case("1 2\n", "3\n"), case("5 -5\n", "0\n")])
    row = {"question_content": f"Add. {name}", "question_id": name, "public_test_cases": tests}
    return {**row, **fields}


def test_live_code_bench_problems(tmp_path):
    hidden = json.dumps([case("[1, 2]\n3", "6", "functional")])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    function = question(
        "f",
        public_test_cases=[case("[1]\n1", "2", "functional")],
        private_test_cases=packed,
        metadata=json.dumps({"func_name": "total"}),
        starter_code="class Solution:\n    def total(self, xs, k):",
    )
    task = make("programs", test=write(tmp_path / "t.jsonl", question(), function), seconds=5.0)
    add, total = task.examples("test")
    assert "Add. q" in add.prompt
    assert "def total" in total.prompt
    assert max(len(add.prompt), len(total.prompt)) == task.max_prompt_chars
    assert set(add.prompt + total.prompt) <= set(task.alphabet)
    assert task.isolation in MODES
    method = "class Solution:\n  def total(self, xs, k): return sum(xs) + k"
    verdicts = [
        (add, ADD, 1), (add, "```python\nprint(3)\n```", 0), (add, "3", 0),
        (total, f"```python\n{method}\n```", 1), (total, f"```python\n{method} - 1\n```", 0),
        (total, "```python\nclass Solution:\n  def total(self, xs, k): return 2\n```", 0),
    ]  # fmt: skip
    for example, completion, verdict in verdicts:
        assert task.verify(example, completion) == verdict, completion
    rows = [rewards.Row(e, completion, types.STOP, 9) for e, completion, _ in verdicts]
    with rewards.Scorer(task, workers=3) as scorer:
        found = [future.result().parts["accuracy"] for future in scorer.submit(rows)]
    assert found == [v for _, _, v in verdicts]


def test_a_long_output_is_compared_where_one_is_expected(tmp_path):
    numbers = " ".join(map(str, range(10**9, 10**9 + 200_000)))
    rows = question("long", public_test_cases=[case("", numbers)]), question("short")
    task = make("programs", test=write(tmp_path / "t.jsonl", *rows), seconds=30.0)
    program = "```python\nprint(*range(10**9, 10**9 + 200_000), sep=' \\n'[i])\n```"
    long, short = task.examples("test")
    assert task.verify(long, program.replace("[i]", "[0]")) == 1.0
    assert task.verify(long, program.replace("[i]", "[1]")) == 0.0
    assert task.verify(short, program.replace("[i]", "[0]")) == 0.0


@pytest.mark.parametrize("names", [("", ""), (None, None), ("a", "a"), (1, "1"), ("2", None)])
def test_every_problem_has_its_own_tests(tmp_path, names):
    """An id that is missing, empty or there twice names another problem's tests."""
    rows = [
        question(f"{i}", question_id=name, public_test_cases=[case("", str(i))])
        for i, name in enumerate(names)
    ]
    other = question("o", question_id=names[0], public_test_cases=[case("", "5")])
    train, test = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", other)
    task = make("programs", train=train, test=test, seconds=30.0)
    for example, right in zip(
        (*task.examples("train"), *task.examples("test")), "015", strict=True
    ):
        for printed in "015":
            verdict = task.verify(example, f"```python\nprint({printed})\n```")
            assert verdict == (printed == right), (example, printed)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hostile-pickle",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"public_test_cases": "[]"}, "no tests"),
        ({"public_test_cases": "[1"}, "public_test_cases is not JSON"),
        ({"public_test_cases": "[1]"}, "list of objects"),
        ({"public_test_cases": [{"input": 1, "output": ""}]}, "list of objects"),
        ({"private_test_cases": "!!"}, "private_test_cases cannot be unpacked"),
        ({"public_test_cases": [case("", "", "other")]}, "testtype must be"),
        ({"public_test_cases": [case("1", "1", "functional")]}, "func_name"),
        ({"metadata": "{"}, "metadata is not JSON"),
        ({"question_content": None}, "field 'question_content'"),
    ],
)
def test_broken_problems_are_refused_with_their_line(tmp_path, fields, message):
    path = write(tmp_path / "t.jsonl", question(), question("b", **fields))
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        make("programs", test=path).examples("test")


def test_a_data_file_cannot_run_code(tmp_path, monkeypatch):
    """The original format is a pickle, which may name any function to call."""
    monkeypatch.chdir(tmp_path)
    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(ValueError, match="in a data file"):
        parse(question(private_test_cases=packed))
    assert not list(tmp_path.iterdir())


def test_tests_are_limited_and_options_checked():
    assert len(parse(question(), max_tests=1).tests) == 1
    for options, message in (
        ({"seconds": 0}, "seconds"),
        ({"isolation": "no"}, "isolation must be one of namespaces, plain, got 'no'"),
        ({"sandbox": "no"}, "namespaces, plain"),
    ):
        with pytest.raises(ValueError, match=message):
            Programs(**options)
