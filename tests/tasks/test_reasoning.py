"""reasoning_gym tasks: reproducible, one right answer each, no credit for anything else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zlib
from fractions import Fraction

import pytest

from sapo_jax.tasks import make
from sapo_jax.tasks.reasoning import COMPACT, DATASETS, KINDS, MAX_ANSWER_CHARS, SLOW, compact

COUNT = 12


def first(task, split="train", count=COUNT):
    sequence = task.examples(split)
    return [sequence[i] for i in range(count)]


@pytest.mark.parametrize("dataset", DATASETS)
def test_data_sets(dataset):
    """The reference scores 1; containing it, a near miss, junk, and hedging score 0."""
    for level in (0, 1) if dataset not in SLOW else (0,):
        task = make("reasoning_gym", dataset=dataset, level=level)
        examples = first(task)
        answers = {e.answer for e in first(task, count=40)}
        assert {e.prompt for e in first(task, "test")}.isdisjoint(e.prompt for e in examples)
        for example in examples:
            answer = example.answer
            assert task.verify(example, example.demonstration) == 1.0
            assert task.verify(example, f" {answer}\n") == 1.0
            assert len(example.prompt) <= task.max_prompt_chars
            assert len(answer) <= task.max_completion_chars
            assert set(example.prompt + answer) <= set(task.alphabet)
            other = min(answers - {answer})
            wrong = (
                "", " ", "zzz", "0.01", "nan", f"the answer is {answer}", f"{answer} {answer}",
                f"{answer} or {other}", f"{other}, {answer}", f"{answer}{answer}", f"-{answer}",
                f"1{answer}", f"{answer}1", f"{answer}|{other}", other, "\ud800", "1" * 10**6,
                "９", "None", "True", "[]", "{}",
            )  # fmt: skip
            for completion in wrong:
                if completion != answer and answer != "0":  # -0, 00 and 0 are one number
                    assert task.verify(example, completion) == 0.0, (answer, completion)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_package_agrees_about_its_own_answers(dataset):
    task = make("reasoning_gym", dataset=dataset)
    problems = task._problems
    for i in range(5):
        assert problems.score_answer(problems[i]["answer"], problems[i]) == 1.0
        assert KINDS[DATASETS[dataset]](problems[i]["answer"]) is not None


def test_other_processes_with_other_hash_seeds_draw_the_same_examples():
    """polynomial_multiplication and others differ between hosts: none of them is allowed."""
    code = (
        "import zlib\n"
        "from sapo_jax.tasks import make\n"
        "from sapo_jax.tasks.reasoning import DATASETS\n"
        "for name in DATASETS:\n"
        "    task = make('reasoning_gym', dataset=name)\n"
        "    rows = [task.examples('train')[i] for i in range(6)]\n"
        "    print(name, zlib.crc32(repr(rows).encode()))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = [
        f"{name} {zlib.crc32(repr(first(make('reasoning_gym', dataset=name), count=6)).encode())}\n"
        for name in DATASETS
    ]
    assert output == "".join(here)


NUMBER = r"\d+(?:\.\d+)?"
STEP = re.compile(
    rf"(?<![\w./%*+-])((?:{NUMBER} *[-+*/] *)+{NUMBER}) *= *({NUMBER})(?![\d%]| *[-+*/])"
)


def test_answers_of_gsm_symbolic_are_worked_out():
    """The steps that the package gives are right, and end in the answer.

    Of some templates the answers are rounded, and one in five is wrong: 0.42 · 80 is not 33
    students. Those are left out.
    """
    problems = make("reasoning_gym", dataset="gsm_symbolic")._problems
    seen = 0
    for i in range(1600):  # each template 20 times
        entry, template = problems[i], problems.task_indices[i]
        steps = re.sub(r"[$£€¥₹]|(?<=\d),(?=\d{3})", "", entry["metadata"]["answer_cot"])
        steps = steps.replace(" x ", " * ")
        assert Fraction(steps.rpartition("####")[2].strip()) == Fraction(entry["answer"])
        for found in STEP.finditer(steps) if template not in (53, 60) else ():  # %, ÷ a fraction
            places = len(found[2].partition(".")[2])
            behind = steps[: found.start()].rstrip()[-1:] not in ("+", "-", "*", "/")
            near = abs(eval(found[1]) - float(found[2])) <= (
                0.5001 * 10**-places if places else 1e-6
            )
            assert near or not behind, (template, found[0])
            seen += 1
    assert seen > 2000
    with pytest.raises(ValueError, match=r"gsm_symbolic has no \['terms'\]; it has none"):
        first(make("reasoning_gym", dataset="gsm_symbolic", levels={"terms": 1}))


@pytest.mark.parametrize("dataset", COMPACT)
def test_compact_prompts_keep_the_problem(dataset):
    """Every number of the question is in the prompt, in its order, and the words are not."""
    for level in (0, 2):
        task = make("reasoning_gym", dataset=dataset, level=level, prompt="compact")
        examples = first(task)
        assert all(len(e.prompt) <= task.max_prompt_chars for e in examples)
        assert all(" " not in e.prompt for e in examples)
    for i in range(20):
        entry = task._problems[i]
        found = compact(dataset, entry["question"])
        if DATASETS[dataset] == "integer" and dataset in ("chain_sum", "basic_arithmetic"):
            assert eval(found.rstrip("=")) == int(entry["answer"])


def test_compact_forms():
    cases = {
        "chain_sum": (
            "State the final answer to the following arithmetic problem: 4 - 1 =",
            "4-1=",
        ),
        "gcd": ("Find the Greatest Common Divisor (GCD) of these numbers: 9, 6. Give", "gcd(9,6)="),
        "simple_equations": ("Determine x that satisfies: 2*x + 8 = 12", "2*x+8=12;"),
        "spell_backward": ("Spell this word backward (example: sun -> nus): tea", "tea<"),
    }
    for dataset, (question, prompt) in cases.items():
        assert compact(dataset, question) == prompt
    assert compact("chain_sum", "no sum at all") is None


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("whole", ["9", "+9", "09", "9."], ["so 9", "9.0", "<answer>9</answer>"]),
        (
            "tags",
            ["<answer>9</answer>", "8 <answer>8</answer> <answer> 9 </answer> 7"],
            ["9", "<answer>9", "<answer>8 or 9</answer>", "<answer>9</answer><answer>8</answer>"],
        ),
        (
            "boxed",
            [r"\boxed{9}", r"\boxed{8} \boxed{9}"],
            ["9", r"\boxed{9", r"\boxed{9}\boxed{8}"],
        ),
        ("last", ["9", "2 + 7 = 9.", "9", "1,000 then 9"], ["9, no, 8", "", "-9", "9.5", "9.8.7"]),
    ],
)
def test_where_the_answer_is_read(answer, right, wrong):
    task = make("reasoning_gym", dataset="chain_sum", answer=answer)
    example = next(e for e in first(task, count=500) if e.answer == "9")
    for completion in [*right, example.demonstration]:
        assert task.verify(example, completion) == 1.0, completion
    for completion in wrong:
        assert task.verify(example, completion) == 0.0, completion


def test_curriculum_levels_and_options_change_the_problems():
    lengths = [
        max(len(e.prompt) for e in first(make("reasoning_gym", level=level, prompt="compact")))
        for level in (0, 1, 3)
    ]
    assert lengths == sorted(set(lengths))
    only = make("reasoning_gym", levels={"num_terms": 2}, prompt="compact")
    terms = [e.prompt.count("+") + e.prompt.count("-") for e in first(only)]
    assert max(terms) >= 3
    fixed = make("reasoning_gym", options={"min_terms": 6, "max_terms": 6}, prompt="compact")
    assert all(len(e.prompt) >= 12 for e in first(fixed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "number_sequence"}, "dataset must be one of"),
        ({"dataset": "game_of_life_halting"}, "dataset must be one of"),
        ({"dataset": "aiw", "prompt": "compact"}, "dataset must be one of basic_arithmetic"),
        ({"level": -1}, "level must be"),
        ({"answer": "regex"}, "answer must be one of"),
        ({"dataset": "syllogism", "answer": "last"}, "syllogism has none"),
        ({"template": "x"}, "template"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make("reasoning_gym", **options)


def test_attributes_and_fields_that_a_data_set_lacks_are_named():
    with pytest.raises(ValueError, match=r"\['digits'\]; it has num_terms, num_digits"):
        first(make("reasoning_gym", levels={"digits": 1}))
    with pytest.raises(ValueError, match="options of chain_sum"):
        first(make("reasoning_gym", options={"digits": 1}))


def test_long_answers_are_refused_quickly():
    task = make("reasoning_gym", answer="tags")
    example = first(task)[0]
    for text in ("<answer>" * 10**5, "<answer>" + "9" * 10**6 + "</answer>", "9" * 10**6):
        start = time.perf_counter()
        assert task.verify(example, text) == 0.0
        assert time.perf_counter() - start < 1
    assert task.max_completion_chars <= MAX_ANSWER_CHARS
