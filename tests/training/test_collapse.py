"""The rule of collapse, one iteration at a time: by what, since when, and what is none."""

import numpy as np
import pytest

from sapo_jax.cli import from_config
from sapo_jax.training.collapse import Collapse

RULE = from_config("base").collapse.to_dict()


def marks(accuracy, spread=None, **rule):
    """run/collapsed_at of each iteration."""
    watch, found = Collapse(RULE | rule), []
    for i, value in enumerate(accuracy):
        entropy = 1.0 if spread is None else spread[i]
        watch.add({"iteration": i + 1, "reward/accuracy": value, "policy/entropy": entropy})
        found.append(watch.since())
    return found


def reference(values, share, window, least=None):
    """The same from the definition, in NumPy, over all iterations so far for each of them."""
    means = np.convolve(values, np.ones(window) / window, "valid")
    best = np.maximum.accumulate(means) if least is not None else np.full_like(means, means[0])
    down = np.r_[np.zeros(window - 1, bool), (means < share * best) & (best >= (least or 0))]
    since = 0
    for i, is_down in enumerate(down):
        since = (since or i + 1) if is_down else 0
        yield since


@pytest.mark.parametrize("window", [1, 3, 10])
def test_marks_are_those_of_the_definition(rng, window):
    values = np.clip(np.cumsum(rng.normal(0, 0.08, 300)) + 0.3, 0, 1)
    found = marks(values.tolist(), window=window)
    assert found == list(reference(values, 0.5, window, 0.05))
    assert {0} < set(found)
    entropy = np.abs(np.cumsum(rng.normal(0, 0.1, 300)) + 1)
    found = marks([0.5] * 300, entropy.tolist(), window=window, rule="entropy", entropy=0.5)
    assert found == list(reference(entropy, 0.5, window))
    assert {0} < set(found)


def test_what_recovers_has_not_collapsed():
    """The mark is there while it is down, and its iteration stays; then it is 0 again."""
    found = marks([0.8] * 20 + [0.1] * 20 + [0.8] * 20, window=5)
    assert set(found) == {0, 23}
    assert found[21:23] == [0, 23]
    assert found[-1] == 0


def test_which_rule_marks():
    fallen, certain = [0.8] * 10 + [0.0] * 10, [1.0] * 5 + [0.01] * 15
    for rule, at in (("reward", 13), ("entropy", 9), ("either", 9)):
        assert marks(fallen, certain, rule=rule, window=4)[-1] == at
    assert marks([0.04] * 10 + [0.0] * 10, window=4)[-1] == 0  # there was nothing to lose
    assert marks([0.04] * 10 + [0.0] * 10, window=4, least=0.01)[-1] == 13
    assert marks([0.8, None] * 10, window=4)[-1] == 0


def test_it_goes_on_from_records():
    """A run that is started again marks what it would have, and its first evaluation is nothing."""
    values = [0.9] * 12 + [0.1] * 12
    records = [{"iteration": i, "reward/accuracy": v} for i, v in enumerate([None, *values])]
    whole = Collapse(RULE, records)
    for cut in (0, 7, 14, 20):
        again = Collapse(RULE, records[:cut])
        for record in records[cut:]:
            again.add(record)
        assert again.since() == whole.since() == 18
