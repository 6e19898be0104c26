r"""Math answers: labelled right and wrong ones, hostile ones, and processes that survive them.

``oracles/math_answers.txt`` holds the labels: no wrong answer is accepted. Right answers that are
refused, all of them deliberate, are its "missed" rows: numbers that are not worked out (3+4,
2^{-1}, \sqrt{49}, 14/2 behind a chain of equations), numbers in words, converted units, sets in
builder notation, and points written as equations.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import threading
import time

import pytest

from sapo_jax import rewards, types
from sapo_jax.tasks import make
from sapo_jax.tasks.base import make_example
from sapo_jax.tasks.verifiers import math_equal, math_text
from sapo_jax.tasks.verifiers.forks import Forks

LABELS = pathlib.Path(__file__).parents[1] / "oracles" / "math_answers.txt"
BOUND = 1.5  # seconds in which any answer is judged


def slowdown():
    """Wall time per processor time, here and now: 1 on an idle machine."""
    start = time.perf_counter(), time.process_time()
    while time.process_time() - start[1] < 0.05:
        pass
    return (time.perf_counter() - start[0]) / (time.process_time() - start[1])


def in_time(seconds, bound=BOUND):
    return seconds <= bound or seconds <= 1.5 * bound * slowdown()


@pytest.fixture(scope="module")
def forks():
    """Comparisons with more time than in a run, so that a busy machine changes no verdict."""
    with Forks("sapo_jax.tasks.verifiers.math_equal:compare", seconds=5) as forks:
        yield forks


@pytest.fixture(scope="module")
def task():
    task = make("math_answer")
    task.start()
    yield task
    task.close()


def labelled():
    for line in LABELS.read_text().splitlines():
        if not line.startswith("#"):
            kind, gold, *found = line.split(" ;; ")
            yield from ((kind, gold, answer) for answer in found)


def test_labelled_answers(forks):
    rows = list(labelled())
    wrong = [
        (kind, gold, answer)
        for kind, gold, answer in rows
        if math_equal.same(gold, answer, forks.call) != (kind == "right")
    ]
    assert not wrong
    kinds = [kind for kind, _, _ in rows]
    assert kinds.count("right") >= 240
    assert kinds.count("wrong") >= 300
    assert kinds.count("missed") <= 20


@pytest.mark.parametrize(
    ("completion", "boxed"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{3} no, \boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}} is it", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed{3} and then \boxed{\frac{1}{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{7\}", None),
        (r"\boxed", None),
        (r"\boxed 7", None),
        ("\\boxed{7\\", None),
        ("boxed{7}", None),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_the_last_box_counts(completion, boxed):
    """Truncated completions have no answer, even with an earlier guess in a closed box."""
    assert math_text.last_boxed(completion) == boxed


def test_completions(task):
    example = make_example("p", "73", "")
    right = (r"\boxed{73}", r"\boxed{72}, no: \boxed{073}", r"$$\boxed{73}$$", r"\boxed{x=73}")
    wrong = (
        "73", r"\boxed{73} \boxed{72}", r"\boxed{73", r"\boxed{73}\boxed{", r"\boxed{}", "",
        r"\boxed{72,73}", r"\boxed{73}\boxed{}", r"\fbox{73}", r"\boxed{7}3",
    )  # fmt: skip
    for completion in right:
        assert task.verify(example, completion) == 1.0, completion
    for completion in wrong:
        assert task.verify(example, completion) == 0.0, completion


def hostile_answers():
    """Answers that have stopped a verifier, or might."""
    n = 290  # just under the length that is still parsed
    yield from (c * n for c in "([{}])\\^_$&#%~+-*/=<>!|,.;:'\"`@?ex1")
    yield from (c * 1_000_000 for c in "(9\\{ x^")
    yield from (a * 60 + "x" + b * 60 for a, b in ("()", "[]", ("{", "}"), ("|", "|")))
    for command in ("sqrt", "frac1", "sin", "log", "text", "overline", "mathbb", "left("):
        yield rf"\{command}{{" * 25 + "x" + "}" * 25
    yield from ("10^{10^{10}}", "9^{9^{9^{9}}}", "2^" * 90 + "2", "x^{" * 60 + "2" + "}" * 60)
    yield from ("9**9**9**9", "9^9^9^9", "(9^{9^{9}})!", "10^{10^{8}}!", "((((99!)!)!)!)!")
    yield from (r"\frac{" * 40 + "1" + "}{2}" * 40, r"\frac{1}{" * 40 + "0" + "}" * 40)
    yield from ("+".join(f"x_{i}^{i}" for i in range(40)), "*".join(f"(x+{i})" for i in range(50)))
    yield from ("(x+y+z+w)^{99}", "(a+b+c+d+e+f)^{999999}", "(x^{9999}+1)(x^{9999}-1)", "x^{1e9}")
    yield from (r"\sum_{i=1}^{10^{10}} i", r"\prod_{i=1}^{10^9} i", r"\int_0^1 x^{x^x} dx")
    yield from (r"\lim_{x\to 0}\frac{\sin x}{x}", r"\binom{10^9}{10^8}", r"\sin(10^{10^{10}})")
    yield from (r"\sqrt[10^{9}]{2}", r"\log_{10^{10^{10}}} 2", r"\zeta(10^{9})", r"\Gamma(10^{9})")
    yield from ("__import__('os').system('touch pwned')", "exec('1/0')", "eval(\"open('pwned')\")")
    yield from ("().__class__.__bases__[0].__subclasses__()", "lambda: 0", "os._exit(1)", "exit()")
    yield from (r"\input{/etc/passwd}", r"\write18{touch pwned}", r"\def\x{\x\x}\x", r"\catcode`\{")
    yield from (
        "\x00",
        "7\x00",
        "\x1b[2J7",
        "7\r\n7",
        "\ud800",
        "\u202e7",
        "７",
        "٧",
        "7\u200b",
        "\x7f",
    )
    yield from (
        "nan",
        r"\text{nan}",
        "1e999",
        "1e-999",
        "1e999999999",
        "0x7",
        "0b111",
        "1_000",
        "Ⅶ",
    )
    yield from (
        "1/0",
        r"\frac{0}{0}",
        r"\infty-\infty",
        "0^0",
        r"\log 0",
        r"\tan(\pi/2)",
        r"\sqrt{-1}",
    )
    yield from (
        r"\begin{pmatrix}" + "1&" * 120 + r"1\end{pmatrix}",
        r"\begin{matrix}" * 15,
        r"\end{x}",
    )
    yield from (
        "1," * 140 + "1",
        r"\{" + "x," * 120 + r"x\}",
        "[0,1)" * 50,
        r"\cup" * 70,
        "<" * 99 + "x",
    )
    yield from (r"[0,1)\cup" * 20 + "[0,1)", r"\{1\}\times" * 20 + r"\{1\}", "x=" * 140 + "7")
    yield from (
        "," * n,
        "1 " * 140,
        "1,000" * 55,
        "0" * n,
        "." + "9" * 280,
        "9" * n + "/" + "7",
        " ",
    )


def test_hostile_answers(task, tmp_path, monkeypatch):
    """Each is wrong, judged in time, and leaves the processes alive."""
    monkeypatch.chdir(tmp_path)
    golds = ["7", r"2\sqrt{3}", "[0,1)", "x^2+2x+1", r"\{1,2\}", r"\text{no}"]
    hostile = list(hostile_answers())
    assert len(hostile) >= 100
    late = 0
    for i, answer in enumerate(hostile):
        example = make_example("p", golds[i % len(golds)], "")
        seconds = []
        while not seconds or (not in_time(seconds[-1]) and len(seconds) < 4):
            start = time.perf_counter()
            verdict = task.verify(example, rf"\boxed{{{answer}}}")
            seconds.append(time.perf_counter() - start)
            assert verdict == 0.0, (example.answer, answer[:80])
        late += not in_time(min(seconds))
    assert not late
    assert not list(tmp_path.iterdir())
    assert task.verify(make_example("p", r"2\sqrt{3}", ""), r"\boxed{\sqrt{12}}") == 1.0


def test_random_answers_never_raise(task):
    rng = random.Random(0)
    pieces = [*r"0123456789+-*/=^_{}()[],.xyz% $", r"\frac", r"\sqrt", r"\text{", r"\pi", r"\cup"]
    for _ in range(3000):
        answer = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for gold in ("7", r"\text{no}"):  # those that need no process
            task.verify(make_example("p", gold, ""), rf"\boxed{{{answer}}}")


def kill(server):
    os.kill(server._process.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.01)


def test_a_killed_server_is_replaced():
    """The death of a server changes no verdict: another one judges."""
    with Forks("operator:add", seconds=5) as forks:
        assert forks.call("a", "b") == "ab"
        for _ in range(2):
            (server,) = forks._servers
            kill(server)
            assert forks.call("a", "b") == "ab"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("time:sleep", (60,)),
        ("os:abort", ()),
        ("os:_exit", (3,)),
        ("os:close", (1,)),
        ("builtins:eval", ("[0] * 10**10",)),
        ("builtins:eval", ("9**9**9",)),
        ("builtins:eval", ("print('1') or 1/0",)),
        ("builtins:eval", ("'x' * 10**8",)),
        ("builtins:eval", ("object()",)),
    ],
)
def test_calls_that_hang_crash_or_say_too_much_give_nothing_in_time(function, arguments):
    with Forks(function, seconds=0.3, wall=0.6, memory_mb=512) as forks:
        forks.start()
        before = {server._process.pid for server in forks._servers}
        start = time.perf_counter()
        assert forks.call(*arguments) is None
        assert in_time(time.perf_counter() - start)
        assert {s._process.pid for s in forks._servers if s.alive} == before


def test_servers_work_side_by_side_for_many_threads():
    with Forks("time:sleep", workers=4, wall=0.4) as forks:
        forks.start()
        start = time.perf_counter()
        threads = [threading.Thread(target=forks.call, args=(9,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert in_time(time.perf_counter() - start, 2.0)  # 8 · 0.4 s one after the other


def test_a_function_that_cannot_be_imported_says_so():
    with (
        Forks("no_such_module:f") as forks,
        pytest.raises(RuntimeError, match="import no_such_mod"),
    ):
        forks.call("x")


def test_a_scorer_survives_the_death_of_the_processes(task):
    example = make_example("p", r"2\sqrt{3}", "")
    row = rewards.Row(example, r"\boxed{\sqrt{12}}", types.STOP, 5)
    with rewards.Scorer(make("math_answer"), workers=2) as scorer:
        assert [f.result().parts["accuracy"] for f in scorer.submit([row] * 4)] == [1, 1, 1, 1]
        for server in list(scorer.task._judge._servers):
            kill(server)
        assert [f.result().parts["accuracy"] for f in scorer.submit([row] * 4)] == [1, 1, 1, 1]


def write(path, *lines):
    path.write_text("\n".join(lines))
    return str(path)


def test_problems_are_read_in_the_aime_format(tmp_path):
    test = write(tmp_path / "t.jsonl", '{"problem": "2+2? \\u03c0", "answer": 4}', "", "")
    train = write(tmp_path / "a.jsonl", '{"q": "3+3?", "a": "so 6\\n#### 1,006"}')
    task = make("math_answer", test=test, template="Q: {problem} \\boxed{}")
    (example,) = task.examples("test")
    assert example == make_example("Q: 2+2? π \\boxed{}", "4", "")
    assert set(example.prompt) <= set(task.alphabet)
    assert task.max_prompt_chars == len(example.prompt)
    assert task.verify(example, r"\boxed{4}") == 1.0
    other = make("math_answer", train=train, problem_field="q", answer_field="a")
    assert [e.answer for e in other.examples("train")] == ["1,006"]
    with pytest.raises(ValueError, match="'train' has no file"):
        task.examples("train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.examples("dev")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"problem": "p", "answer": 1}', "{"], "line 2: no JSON"),
        (["", "[1]"], "line 2: expected an object, got list"),
        (['{"problem": "p"}'], "line 1: no field 'answer'; it has problem"),
        (['{"problem": 5, "answer": 1}'], "line 1: field 'problem' is 5"),
        (['{"problem": "p", "answer": null}'], "line 1: field 'answer' is None"),
        (['{"problem": "p", "answer": true}'], "line 1: field 'answer' is True"),
        ([""], "is empty"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, lines, message):
    task = make("math_answer", train=write(tmp_path / "x.jsonl", *lines))
    with pytest.raises(ValueError, match=message):
        task.examples("train")


def test_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path / "b", "line 1: no JSON: .utf-8"),
        (tmp_path / "c", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            make("math_answer", train=str(path)).examples("train")
    with pytest.raises(ValueError, match="template"):
        make("math_answer", template="no place")
