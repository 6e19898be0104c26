"""Whether a completion leaves the language of its prompt, by its letters."""

import pytest

from sapo_jax.rewards import Recipe, Row, judge
from sapo_jax.tasks.base import make_example
from sapo_jax.tasks.verifiers.writing import scripts, switching
from sapo_jax.types import STOP
from tests.test_rewards import Fixed

ENGLISH, CHINESE, JAPANESE = (
    "How many apples are there?",
    "一共有多少个苹果？",
    "りんごは何個ありますか",
)
CASES = [
    (ENGLISH, "There are 5 apples.", 0),
    (ENGLISH, "5", 0),
    (ENGLISH, "", 0),
    ("4-1-7=", "苹果", 0),  # nothing to leave
    (ENGLISH, "五个苹果", -1),
    (ENGLISH, "apple 苹果", -2 / 7),
    (ENGLISH, "Сколько", -1),
    (ENGLISH, "naïve café", 0),
    (ENGLISH, "so α + β² = π, ℝ ⊂ ℂ and µ", 0),  # notation is no language
    (CHINESE, "一共有五个苹果", 0),
    (CHINESE, r"<think>设 x = 5</think>\boxed{5} 个", 0),  # nor are LaTeX, tags, variables
    (CHINESE, "five apples", -1),
    (CHINESE, "りんご", -1),
    (JAPANESE, "五個のリンゴ", 0),
    (JAPANESE, "사과", -1),
    ("用 Python 写一个函数", "Python 函数", 0),  # what the prompt mixes may be mixed
    ("Ｈｏｗ ｍａｎｙ？", "five", 0),
]


@pytest.mark.parametrize(("prompt", "completion", "penalty"), CASES)
def test_switching(prompt, completion, penalty):
    assert switching(prompt, completion) == pytest.approx(penalty)


def test_every_character_has_an_answer():
    """Unnamed, private and broken ones, too: a policy writes anything."""
    whole = "".join(map(chr, range(0x11000))) + "\U000fffff\ud800"
    assert scripts(whole)["CJK"] > 20000
    assert -1 <= switching(ENGLISH, whole) < -0.9


def test_it_is_a_part_of_the_reward():
    row = Row(make_example(ENGLISH, "5", ""), "5 苹果", STOP, 4)
    parts = judge(Fixed(1.0), row, Recipe(language=0.5))
    assert parts == {"accuracy": 1.0, "language": -1.0}
