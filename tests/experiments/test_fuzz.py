"""The fuzz draws the same from a seed, and tells a refusal that helps from one that does not."""

import random
import time

import pytest

from experiments.fuzz import odd, run
from tests import tiny_config


def test_a_seed_draws_the_same_configs():
    first, again, other = (list(odd.draw(120, random.Random(seed))) for seed in (0, 0, 1))
    assert repr(first) == repr(again) != repr(other)
    kinds = {kind for kind, _ in first}
    assert kinds == {"a value", "several values", "a combination", "a name", "a mixture"}


def test_every_field_has_its_turn():
    drawn = list(odd.draw(600, random.Random(0)))
    changed = {field for kind, changes in drawn if kind == "a value" for field in changes}
    assert changed >= {"learner.eps", "dtype.cache", "mesh", "task.options", "objective.k_pos"}
    assert changed >= set(tiny_config.get_config())
    assert len(changed) > 120


def test_odd_configs_are_accepted_or_refused_by_name():
    """A short one, of another seed than the one whose results are stored."""
    for i, (kind, changes) in enumerate(odd.draw(150, random.Random(99))):
        what, text, _ = run.outcome((run.by_flags, run.by_hand)[i % 2], changes)
        assert what in odd.FINE, f"{kind} {changes}: {text}"


@pytest.mark.parametrize(
    ("text", "changes", "named"),
    [
        ("config.learner.eps=-1: must be greater than 0", {"learner.eps": -1}, True),
        ("config.learner.eps: must be greater than 0", {"learner.eps": -1}, False),
        ("a number must be greater than 0, not -1", {"learner.eps": -1}, False),
        ("config.iterations=6: must be at most 1", {"batch.minibatches": 2**30}, False),
        ("config.lerner: there is no such field", {"lerner.eps": 1}, True),
        ("config.tasks.a.share=3: must be in (0, 1]", {"tasks": {"a": {"share": 3}}}, True),
    ],
)
def test_a_refusal_has_to_name_the_field_and_the_value(text, changes, named):
    def refuse(_):
        raise ValueError(text)

    assert run.outcome(refuse, changes)[0] == ("refused" if named else "unnamed")


def test_what_hangs_or_fails_inside_is_told(monkeypatch):
    monkeypatch.setattr(run, "LIMIT", 1)
    assert run.outcome(lambda _: time.sleep(60), {})[0] == "hang"
    assert run.outcome(lambda _: {}["key"], {})[0] == "KeyError"
