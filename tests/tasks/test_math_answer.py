r"""Math answers: labelled right and wrong ones, hostile ones, and references that nothing can meet.

``oracles/math_answers.txt`` holds the labels, by kind. No wrong answer is accepted. The right ones
that are refused, all known, are its "missed" rows; docs/judging.md counts them.
"""

from __future__ import annotations

import json
import random
import threading
import time
from fractions import Fraction

import pytest

from sapo_jax import datasets
from sapo_jax.tasks import make, prepared
from sapo_jax.tasks.base import make_example
from sapo_jax.tasks.verifiers import math_equal, math_text, math_values
from sapo_jax.tasks.verifiers.math_numbers import Budget, UnreadableError
from tests.oracles import judged

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
def task():
    return make("math_answer")


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, *_ in judged.pairs()))
def test_labelled_answers(kind):
    bad = []
    for _, verdict, gold, answer in (row for row in judged.pairs() if row[0] == kind):
        assert math_equal.same(gold, gold)
        if math_equal.same(gold, answer) != (verdict == "right"):
            bad.append((verdict, gold, answer))
        if verdict == "wrong" and math_equal.same(answer, gold):
            bad.append(("wrong, exchanged", answer, gold))
    assert not bad


def test_the_labels_are_many():
    verdicts = [verdict for _, verdict, *_ in judged.pairs()]
    assert verdicts.count("right") >= 1400
    assert verdicts.count("wrong") >= 2400
    assert verdicts.count("missed") <= 0.018 * verdicts.count("right")


@pytest.mark.parametrize(
    "value", [r"\sqrt{2}", r"\pi", r"e^{-100}", r"\sin 1", r"2^{1000}\sqrt{3}"]
)
@pytest.mark.parametrize("digits", [9, 17, 40, 90, 200])
def test_no_difference_is_too_small(value, digits):
    """Differences below the digits that are computed at first were once nothing."""
    tiny = f"10^{{-{digits}}}"
    for other in (rf"{value}\cdot(1+{tiny})", rf"{value}\cdot\sqrt{{1-{tiny}}}"):
        assert not math_values.equal(value, other, Budget())
        assert math_values.equal(other, f"({other})", Budget())
        assert math_values.equal(other, rf"\frac{{2}}{{1}}\cdot\frac12\cdot {other}", Budget())


def test_random_numbers_are_compared_exactly():
    rng = random.Random(0)
    for _ in range(200):
        a, b = (Fraction(rng.randrange(-30, 30), rng.randrange(1, 9)) for _ in range(2))
        texts = [rf"\frac{{{x.numerator}}}{{{x.denominator}}}" for x in (a, b)]
        sums = (f"{texts[0]}+{texts[1]}", f"{a + b}"), (f"({texts[0]})({texts[1]})", f"{a * b}")
        for text, value in sums:
            assert math_values.equal(text, value, Budget())
            assert not math_values.equal(text, f"{value}+10^{{-500}}", Budget())
        assert math_values.order(*texts, Budget()) == (a > b) - (a < b)


@pytest.mark.parametrize(
    "text", ["1/0", "0^0", "2 3", "x^2^3", r"\sin x/2", "x/2y", r"\text{m}", "", "(", "3_5", "n!!"]
)
def test_ambiguous_and_meaningless_expressions_have_no_value(text):
    with pytest.raises(UnreadableError):
        math_values.equal(text, text, Budget())


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
    yield from (r"\abc" * 60 + "!=113", r"\abc\cdot" * 30 + "!=113")  # a regular expression's trap
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
    """Each is wrong, and judged in time."""
    monkeypatch.chdir(tmp_path)
    golds = ["7", r"2\sqrt{3}", r"\{1,2\}", "x^2+2x+1", "[0,1]", r"\text{no}", "n!", "x=1,y=2"]
    hostile = list(hostile_answers())
    assert len(hostile) >= 100
    late = []
    for i, answer in enumerate(hostile):
        for gold in (golds[i % len(golds)], golds[(i + 3) % len(golds)]):
            example = make_example("p", gold, "")
            seconds = []
            while not seconds or (not in_time(seconds[-1]) and len(seconds) < 4):
                start = time.perf_counter()
                verdict = task.verify(example, rf"\boxed{{{answer}}}")
                seconds.append(time.perf_counter() - start)
                assert verdict == 0.0, (gold, answer[:80])
            late += [answer[:80]] if not in_time(min(seconds)) else []
    assert not late
    assert not list(tmp_path.iterdir())


def test_random_answers_never_raise():
    rng = random.Random(0)
    pieces = [*r"0123456789+-*/=^_{}()[],.:;|!'<>xyzfeimn% $", "or", "and", r"\{", r"\}", r"\\"]
    commands = (
        "frac sqrt{ text{ overline{ mathbb{R} begin{pmatrix} pi cup le ne in pm infty binom sin "
        "log ln neg angle"
    )
    pieces += [rf"\{command}" for command in commands.split()]
    golds = (
        "7",
        r"\text{no}",
        r"2\sqrt{3}",
        "x+1",
        "1,2",
        "(1,2)",
        "x>3",
        "x=1,y=2",
        "x+y=5",
        "3:4",
    )
    for _ in range(5000):
        answer = "".join(rng.choices(pieces, k=rng.randrange(20)))
        for gold in (rng.choice(golds), answer):
            math_equal.same(gold, answer)
            math_equal.same(answer, gold)


def test_threads_give_the_same_verdicts():
    """mpmath's precision is a state that threads would share."""
    rows = [row for row in judged.pairs() if row[0] in ("Tiny and huge numbers", "Expressions")]
    wrong = []

    def judge(start):
        for _, verdict, gold, answer in rows[start::4] + rows[:60]:
            if math_equal.same(gold, answer) != (verdict == "right"):
                wrong.append((gold, answer))

    threads = [threading.Thread(target=judge, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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


UNMEETABLE = ("答案", "9" * 301, r"\frac{1}{2", "7}", "", "  ", "a\u200bb", "x\x07", "naïve", "№ 5")


@pytest.mark.parametrize("answer", UNMEETABLE)
def test_references_that_nothing_can_meet_are_refused_with_the_line(tmp_path, answer):
    """Their problems would be lost: no completion is ever right."""
    rows = [{"problem": "p", "answer": a} for a in ("7", answer, "8", f"so\n#### {answer}")]
    path = write(tmp_path / "x.jsonl", *map(json.dumps, rows))
    with pytest.raises(
        ValueError, match=r"line 2: no completion can meet .*; line 4: no completion"
    ):
        make("math_answer", train=path).examples("train")


def test_many_complaints_are_counted(tmp_path):
    rows = [json.dumps({"problem": "p", "answer": "答"})] * 9
    with pytest.raises(ValueError, match=r"line 1: .*; line 2: .*; line 3: .*; and 6 more$"):
        make("math_answer", train=write(tmp_path / "x.jsonl", *rows)).examples("train")


@pytest.fixture
def worked(tmp_path):
    """A prepared dataset with answers as GSM8K has them."""
    rows = [
        {"prompt": "p", "answer": a} for a in ("3+3=6\n#### 6", "so 1,006\n#### 1,006", r"\frac12")
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return datasets.prepare_jsonl({"train": path, "test": path}, tmp_path / "out")


def test_boxed_references_of_prepared_data_are_cut(worked):
    task = prepared.Prepared(str(worked), verifier="boxed")
    assert [e.answer for e in task.examples("train")] == ["6", "1,006", r"\frac12"]
    verdicts = [task.verify(e, r"so \boxed{1006}") for e in task.examples("train")]
    assert verdicts == [0.0, 1.0, 0.0]
    assert prepared.Prepared(str(worked)).examples("train")[0].answer == "3+3=6\n#### 6"


@pytest.mark.parametrize(
    ("verifier", "answer", "message"),
    [
        ("boxed", "so it is\n#### 答案", "record 1: no completion can meet the answer '答案'"),
        ("last_number", "none", "record 1: the answer 'none' ends in no number"),
        ("last_number", "5k", "record 1: the answer '5k' ends in no number"),
    ],
)
def test_prepared_references_that_nothing_can_meet_are_refused(tmp_path, verifier, answer, message):
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "p", "answer": a} for a in ("1", answer)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = datasets.prepare_jsonl({"train": path, "test": path}, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        prepared.Prepared(str(out), verifier=verifier).examples("train")
    assert len(prepared.Prepared(str(out)).examples("train")) == 2


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
