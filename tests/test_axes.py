"""Sweeps as data: what axes combine to, and what they refuse."""

import json

import numpy as np
import pytest

from sapo_jax.axes import axis, product, zip_


def test_axes_combine():
    """The last part of a product varies fastest; zip_ goes along its parts; both nest."""
    tau = axis("objective.tau_neg", 1.0, 2.0)
    assert tau == [{"objective.tau_neg": 1.0}, {"objective.tau_neg": 2.0}]
    pairs = zip_(axis("seed", 0, 1), axis("init_from", "a", "b"))
    assert pairs == [{"seed": 0, "init_from": "a"}, {"seed": 1, "init_from": "b"}]
    assert product(tau, pairs) == [
        {"objective.tau_neg": t, "seed": s, "init_from": d}
        for t in (1.0, 2.0)
        for s, d in ((0, "a"), (1, "b"))
    ]
    assert zip_(product(axis("a", 1, 2), axis("b", 1, 2)), axis("seed", *range(4)))[3] == {
        "a": 2, "b": 2, "seed": 3,
    }  # fmt: skip


def test_scalars_of_numpy_become_plain_numbers():
    """A manifest holds them as JSON."""
    assert json.dumps(axis("seed", *np.arange(2))) == '[{"seed": 0}, {"seed": 1}]'
    assert (
        type(axis("learner.learning_rate", *np.geomspace(1e-4, 1e-2, 3))[0].popitem()[1]) is float
    )


def test_a_value_may_be_none():
    assert axis("objective.max_length", None, 32)[0] == {"objective.max_length": None}


REFUSED = [
    (lambda: axis("seed"), "axis\\('seed'\\): must have at least one value"),
    (lambda: axis("seed", range(3)), r"write axis\('seed', \*values\)"),
    (lambda: axis("", 1), "must begin with a field's name"),
    (lambda: product(), "at least one part"),
    (lambda: product(axis("seed", 1), []), "none of them empty"),
    (lambda: product(axis("seed", 1), axis("seed", 2)), "seed is in two parts"),
    (lambda: product([3]), "a part must be axis"),
    (lambda: zip_(axis("seed", 1, 2), axis("a.b", 1)), "one length, they are seed: 2, a.b: 1"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
