"""Tasks: disjoint and reproducible splits, demonstrations that verify, verifiers hard to fool."""

from __future__ import annotations

import os
import pathlib
import random
import re
import subprocess
import sys
import textwrap
import time
import zlib
from fractions import Fraction

import pytest

from sapo_jax.cli.configs import import_file
from sapo_jax.tasks import TASKS, make
from sapo_jax.tasks.base import LENGTHS, draw, make_example
from sapo_jax.tasks.countdown import MAX_DEPTH, evaluate, tokenize

GENERATED = ("chain_sum", "countdown")  # the tasks without files or other packages
VARIANTS = [
    ("chain_sum", {}),
    ("chain_sum", {"terms": 2}),
    ("chain_sum", {"terms": 9, "digits": 3, "modulus": 7}),
    ("chain_sum", {"terms": 3, "digits": 2, "modulus": 1001}),
    ("countdown", {}),
    ("countdown", {"numbers": 2, "max_number": 9}),
    ("countdown", {"numbers": 5, "max_number": 12, "max_target": 1000}),
]
HOSTILE = {
    "empty": "",
    "newline": "\n",
    "nul": "\x00\x01\x1b[2J",
    "surrogate": "\ud800=\udfff",
    "right to left": "\u202e=5",
    "full-width digit": "=１",
    "superscript digit": "=²",
    "arabic digit": "٣+٤",
    "import": "__import__('os').system('true')",
    "division by zero": "1/0",
    "zero over zero": "0/(3-3)",
    "power": "9**9**9**9",
    "power tower without stars": "9^9^9",
    "exponent": "1e999999",
    "deep nesting": "(" * 100 + "1" + ")" * 100,
    "deeper than the stack": "(" * 500_000 + "1" + ")" * 500_000,
    "huge number": "9" * 1_000_000,
    "huge product": "*".join(["999999"] * 36),
    "many equals signs": "=" * 1_000_000,
    "spaces": " " * 1_000_000,
    "unbalanced": "((((1+",
    "operators": "+-*/" * 60,
    "regex bomb": "0" * 255 + "!",
}


def variants(*splits):
    return [(make(name, **options), split) for name, options in VARIANTS for split in splits]


def first(task, split, count):
    sequence = task.examples(split)
    return [sequence[i] for i in range(count)]


def test_golden_examples():
    """A change of the generator would change every run's data without any other sign."""
    golden = {
        ("chain_sum", "train", 0): "6-8-0+3+7+8=",
        ("chain_sum", "train", 1048575): "6-3+3-2-9+2=",
        ("chain_sum", "test", 0): "6+3-7+3-7+0=",
        ("chain_sum", "test", 4095): "5-1+7+3+8+2=",
        ("countdown", "train", 0): "4,4,20>84:",
        ("countdown", "train", 1048575): "8,18,19>45:",
        ("countdown", "test", 0): "6,8,11>25:",
        ("countdown", "test", 4095): "9,10,19>1:",
    }
    found = {key: make(key[0]).examples(key[1])[key[2]].prompt for key in golden}
    assert found == golden


@pytest.mark.parametrize(("task", "split"), variants("train", "test"))
def test_demonstrations_verify_and_fit_what_the_task_declares(task, split):
    for example in first(task, split, 400):
        assert task.verify(example, example.demonstration) == 1.0
        assert len(example.prompt) <= task.max_prompt_chars
        assert len(example.demonstration) <= task.max_completion_chars
        assert set(example.prompt + example.demonstration) <= set(task.alphabet)
        assert example.id == zlib.crc32(example.prompt.encode()) < 2**32
    assert "".join(sorted(set(task.alphabet))) == task.alphabet


def test_the_alphabet_and_the_bounds_are_no_larger_than_the_examples_need():
    """Sampling budgets come from the bounds: loose ones cost memory, and hide off-by-ones."""
    for name in GENERATED:
        task = make(name)
        examples = first(task, "train", 5000)
        assert {c for e in examples for c in e.prompt + e.demonstration} == set(task.alphabet)
        assert max(len(e.prompt) for e in examples) == task.max_prompt_chars
        assert max(len(e.demonstration) for e in examples) == task.max_completion_chars


@pytest.mark.parametrize("name", GENERATED)
def test_no_prompt_is_in_both_splits(name):
    """Testing on trained prompts reports memory as reasoning."""
    task = make(name)
    train = {example.prompt for example in first(task, "train", 8000)}
    test = {example.prompt for example in first(task, "test", 2000)}
    assert len(train) > 4000
    assert len(test) > 700
    assert not train & test


def test_an_exhausted_problem_space_still_splits():
    """With 200 possible problems both splits see all of theirs, repeatedly, and share none."""
    task = make("chain_sum", terms=2)
    train = {example.prompt for example in first(task, "train", 3000)}
    test = {example.prompt for example in first(task, "test", 1000)}
    assert len(train) + len(test) == len(train | test) == 200
    assert 10 <= len(test) <= 40


def test_a_split_without_any_problem_raises_instead_of_hanging(monkeypatch):
    monkeypatch.setattr("sapo_jax.tasks.base.MAX_ATTEMPTS", 100)
    task = make("countdown", numbers=2, max_number=1, max_target=1)  # 1,1>1: is its only problem
    with pytest.raises(ValueError, match="too few problems"):
        [task.examples(split)[0] for split in LENGTHS]


@pytest.mark.parametrize("name", GENERATED)
def test_an_example_depends_only_on_its_index(name):
    """Reading in another order, or from the middle after a restart, gives the same data."""
    order = list(range(50))
    random.Random(0).shuffle(order)
    forward = first(make(name), "train", 50)
    sequence = make(name).examples("train")
    assert {i: sequence[i] for i in order} == dict(enumerate(forward))


def test_other_processes_with_other_hash_seeds_draw_the_same_examples():
    """Python's hash() is salted per process: keyed by it, restarts and hosts would disagree."""
    code = (
        "from sapo_jax.tasks import make\n"
        f"for name in {GENERATED}:\n"
        "    for split in ('train', 'test'):\n"
        "        print([make(name).examples(split)[i] for i in range(50)])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    here = [f"{first(make(n), split, 50)}\n" for n in GENERATED for split in ("train", "test")]
    assert outputs == ["".join(here)] * 2


@pytest.mark.parametrize(("task", "split"), variants("train", "test"))
def test_sequences_have_their_length_and_end(task, split):
    sequence = task.examples(split)
    assert len(sequence) == {"train": 2**20, "test": 4096}[split]
    assert sequence[-1] == sequence[len(sequence) - 1]
    for index in (len(sequence), -len(sequence) - 1):
        with pytest.raises(IndexError, match=str(index)):
            sequence[index]


@pytest.mark.parametrize("name", GENERATED)
def test_unknown_split_names_the_allowed_ones(name):
    with pytest.raises(ValueError, match=r"'validation'.*train, test"):
        make(name).examples("validation")


def test_draw_is_uniform_and_keyed():
    bounds = [10, 2, 7]
    rows = [draw(f"key/{i}", bounds) for i in range(7000)]
    for k, bound in enumerate(bounds):
        counts = [sum(row[k] == value for row in rows) for value in range(bound)]
        expected = len(rows) / bound
        assert sum((count - expected) ** 2 / expected for count in counts) < 30  # χ², ≤ 9 d.o.f.
    assert len({tuple(draw(f"key/{i}", [2**64])) for i in range(1000)}) == 1000


@pytest.mark.parametrize("options", [{}, {"terms": 5, "digits": 3, "modulus": 7}])
def test_chain_sum_steps_are_the_sum_worked_out_from_left_to_right(options):
    task = make("chain_sum", **options)
    for example in first(task, "train", 300):
        terms = [int(term) for term in re.findall(r"[+-]?\d+", example.prompt)]
        assert len(terms) == task.terms
        assert all(abs(term) < 10**task.digits for term in terms)
        assert int(example.answer) == sum(terms) % task.modulus
        total = terms[0]
        steps = example.demonstration.split(";")
        for step, term in zip(steps, terms[1:], strict=True):
            left, right = step.split("=")
            assert re.fullmatch(rf"{total}[+-]{abs(term)}", left)
            assert int(right) == (total + term) % task.modulus
            total = int(right)


def test_chain_sum_wraps_below_zero():
    task = make("chain_sum", terms=2)
    answers = {e.prompt: e.answer for e in first(task, "train", 3000) + first(task, "test", 500)}
    assert answers["3-5="] == "98"
    assert answers["5-3="] == "2"


def test_chain_sum_judges_only_the_text_after_the_last_equals_sign():
    task = make("chain_sum")
    example = make_example("7+5-3+8=", "17", "7+5=12;12-3=9;9+8=17")
    for completion in ("=17", "nonsense=17", "1=2=17", "9" * 1000 + "=17"):
        assert task.verify(example, completion) == 1.0
    wrong = "17 7+5=12 =17= =017 =+17 =17.0 =1７ =17; =170 =7 =1 = =-83 =117"
    for completion in [*wrong.split(), "= 17", "=17 ", "=17\n", "=1_7", "", "17=18"]:
        assert task.verify(example, completion) == 0.0, completion


@pytest.mark.parametrize("split", ["train", "test"])
def test_chain_sum_perturbed_answers_score_zero(split):
    task = make("chain_sum")
    for example in first(task, split, 200):
        steps = example.demonstration.rpartition("=")[0]
        for answer in range(100):
            expected = float(str(answer) == example.answer)
            assert task.verify(example, f"{steps}={answer}") == expected


def test_countdown_numbers_and_targets_are_in_range_and_sorted():
    """Sorted numbers give a problem one prompt: no reordering of a test problem is trained on."""
    task = make("countdown", numbers=4, max_number=15, max_target=50)
    examples = first(task, "train", 2000)
    drawn, targets = set(), set()
    for example in examples:
        numbers, target = example.prompt.removesuffix(":").split(">")
        numbers = [int(number) for number in numbers.split(",")]
        assert len(numbers) == 4
        assert numbers == sorted(numbers)
        drawn |= set(numbers)
        targets.add(int(target))
    assert drawn == set(range(1, 16))
    assert targets <= set(range(1, 51))
    assert len(targets) > 45


def test_countdown_demonstrations_use_every_operation():
    text = "".join(example.demonstration for example in first(make("countdown"), "train", 500))
    assert {symbol for symbol in "+-*/()" if text.count(symbol) > 20} == set("+-*/()")


def test_countdown_accepts_any_exact_solution_and_nothing_else():
    task = make("countdown")
    example = make_example("3,5,12>45:", "(12-3)*5", "(12-3)*5")
    for completion in ("(12-3)*5", "5*(12-3)", "((((12))-3)*(5))"):
        assert task.verify(example, completion) == 1.0
    wrong = (
        "45 (12-3)*5=45 12-3*5 (12-3)*5*1 (12-3)*(5 (12-3)*5) (12-3)5 (12-3)*05 (12-3)*+5 "
        "-(3-12)*5 (12-3)**5 (12-3)//5 (12-3)*5; (12-3)*5.0 (12-3)*5_ 9*5 (12-3)*(2+3) "
        "(1２-3)*5 [12-3]*5 (12-3)x5 ()(12-3)*5 12-3)*(5 5-3*12 "
        "5*12-15 5*12-5*3"
    )
    for completion in [*wrong.split(), " (12-3)*5", "(12 - 3)*5", "(12-3)*5\n"]:
        assert task.verify(example, completion) == 0.0, completion


def test_countdown_scores_zero_where_the_right_numbers_make_no_value():
    """These pass the check of the numbers, and reach the parser and the division."""
    task = make("countdown")
    example = make_example("3,3,5>1:", "", "")
    deep = "(" * 80 + "5-3" + ")" * 80 + "/3"
    for completion in (
        "5/(3-3)",
        "(3-3)/(3-3)*5",
        "5*3/",
        "/5*3-3",
        "5 3 3",
        "5(3)3",
        ")5-3-3(",
        deep,
    ):
        assert task.verify(example, completion) == 0.0, completion


def test_countdown_is_exact():
    """In floats 8/(3-8/3) is 23.999999999999989, and a tolerance would accept near misses."""
    task = make("countdown", numbers=4)
    hit = make_example("3,3,8,8>24:", "8/(3-8/3)", "8/(3-8/3)")
    assert task.verify(hit, "8/(3-8/3)") == 1.0
    miss = make_example("1,1,999998,999999>1:", "", "")
    assert task.verify(miss, "1*1*999998/999999") == 0.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_countdown_perturbed_solutions_score_zero(split):
    """Every solution fails for another target, and with a number changed, dropped or repeated."""
    task = make("countdown")
    for example in first(task, split, 300):
        numbers, target = example.prompt.removesuffix(":").split(">")
        other = make_example(f"{numbers}>{int(target) + 1}:", "", "")
        assert task.verify(other, example.answer) == 0.0
        changed = re.sub(r"\d+", lambda m: str(int(m[0]) + 1), example.answer, count=1)
        for completion in (changed, example.answer + "*1", example.answer + "+1-1", target):
            assert task.verify(example, completion) == 0.0


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randrange(20))
    inner = "".join(
        (random_expression(rng, depth - 1), rng.choice("+-*/"), random_expression(rng, depth - 1))
    )
    return f"({inner})" if rng.random() < 0.4 else inner


def test_evaluate_agrees_with_python():
    """Precedence, left associativity (8-3-2, 8/2/2) and parentheses, on random expressions."""
    rng = random.Random(0)
    undefined = 0
    for _ in range(2000):
        text = random_expression(rng, 4)
        try:
            expected = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text))
        except ZeroDivisionError:
            undefined += 1
            with pytest.raises(ZeroDivisionError):
                evaluate(tokenize(text))
            continue
        assert evaluate(tokenize(text)) == expected, text
    assert 0 < undefined < 1000
    assert evaluate(tokenize("8-3-2*2/4")) == Fraction(4)


def test_numbers_of_an_expression_have_at_most_six_digits():
    assert evaluate(tokenize("999999")) == 999_999
    with pytest.raises(ValueError, match="unexpected '7'"):
        evaluate(tokenize("1234567"))


def test_evaluate_bounds_nesting():
    def nested(depth):
        return tokenize("(" * depth + "1" + ")" * depth)

    assert evaluate(nested(MAX_DEPTH)) == 1
    with pytest.raises(ValueError, match="number"):
        evaluate(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", GENERATED)
def test_hostile_completions_score_zero_quickly(name, completion):
    """A verifier that raises or hangs on what a policy wrote ends the run."""
    task = make(name)
    examples = first(task, "test", 3)
    start = time.perf_counter()
    scores = [task.verify(example, completion) for example in examples]
    assert time.perf_counter() - start < 3 * 0.05
    assert scores == [0.0] * 3


@pytest.mark.parametrize("name", GENERATED)
def test_random_strings_never_raise(name):
    task = make(name)
    example = task.examples("train")[0]
    rng = random.Random(0)
    characters = task.alphabet * 3 + "²１\n é"
    for _ in range(3000):
        completion = "".join(rng.choices(characters, k=rng.randrange(30)))
        assert 0.0 <= task.verify(example, completion) <= 1.0


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("chain_sum", "terms", 1, ">= 2"),
        ("chain_sum", "digits", 0, r"in \[1, 3\]"),
        ("chain_sum", "digits", 4, r"in \[1, 3\]"),
        ("chain_sum", "modulus", 1, ">= 2"),
        ("chain_sum", "terms", 2.5, ">= 2"),
        ("countdown", "numbers", 1, r"in \[2, 8\]"),
        ("countdown", "max_number", 0, r"in \[1, 999999\]"),
        ("countdown", "max_number", 1_000_000, r"in \[1, 999999\]"),
        ("countdown", "max_target", "9", r"in \[1, 999999\]"),
    ],
)
def test_options_out_of_range_name_field_value_and_what_is_allowed(name, option, value, allowed):
    with pytest.raises(ValueError, match=rf"{option} .*{allowed}.*{value}"):
        make(name, **{option: value})


@pytest.mark.parametrize("name", TASKS)
def test_registry_keys_are_the_tasks_names(name):
    assert TASKS[name].name == name


def test_make_passes_options_on():
    assert make("chain_sum", terms=3) == TASKS["chain_sum"](terms=3)


def test_make_names_the_nearest_task_and_the_known_options():
    with pytest.raises(ValueError, match=r"'chainsum'.*countdown, .*nearest is 'chain_sum'"):
        make("chainsum")
    with pytest.raises(ValueError, match=r"'zzz'.*my.py:MyTask$"):
        make("zzz")
    with pytest.raises(ValueError, match=r"\['term'\].*terms, digits, modulus"):
        make("chain_sum", term=3)


def test_the_task_of_the_page_is_one(monkeypatch, tmp_path):
    """What the how-to says how to write is a task as it stands there."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "howto" / "task.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "reverse.py").write_text(textwrap.dedent(code))
    module = import_file("howto_reverse", tmp_path / "reverse.py")
    monkeypatch.setitem(TASKS, "reverse", module.Reverse)
    task = make("reverse", length=3)
    for example in first(task, "train", 50) + first(task, "test", 10):
        assert task.verify(example, example.demonstration) == 1.0
        assert task.verify(example, example.prompt) == 0.0
        assert len(example.prompt) == task.max_prompt_chars
        assert len(example.demonstration) == task.max_completion_chars
        assert set(example.prompt + example.demonstration) <= set(task.alphabet)
