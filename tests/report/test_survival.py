"""Kaplan–Meier curves and log-rank tests against their definitions; a page without lifelines."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from sapo_jax.report import survival, sweep, sweep_stats
from sapo_jax.report.survival import Life
from tests.report.test_sweep_stats import run_of

A = [Life(6, True), Life(6, True), Life(6, True), Life(6, False), Life(7, True), Life(9, False)]
B = [Life(1, True), Life(2, True), Life(2, False), Life(3, True), Life(4, True), Life(20, True)]


def product_limit(lives):
    """Π (1 − d/n) by iteration."""
    share, found = 1.0, {0.0: 1.0}
    for t in sorted({life.iterations for life in lives}):
        left = sum(life.iterations >= t for life in lives)
        share *= 1 - sum(life == Life(t, True) for life in lives) / left
        found[float(t)] = share
    return found


def log_rank(a, b):
    """χ² of observed minus expected collapses of the first group, hypergeometric variance."""
    every, difference, variance = a + b, 0.0, 0.0
    for t in sorted({life.iterations for life in every if life.collapsed}):
        n, n_a = (sum(life.iterations >= t for life in some) for some in (every, a))
        d, d_a = (sum(life == Life(t, True) for life in some) for some in (every, a))
        difference += d_a - d * n_a / n
        variance += d * n_a / n * (1 - n_a / n) * (n - d) / max(n - 1, 1)
    return difference**2 / variance


def test_curves_and_tests_are_those_of_the_definitions():
    pytest.importorskip("lifelines")
    scipy_stats = pytest.importorskip("scipy.stats")
    found = survival.compare({"a": A, "b": B})
    for name, lives in (("a", A), ("b", B)):
        own = found["groups"][name]
        curve = product_limit(lives)
        assert own["iteration"] == list(curve)
        np.testing.assert_allclose(own["share"], list(curve.values()), rtol=1e-12)
        low, share, high = (np.array(own[key]) for key in ("low", "share", "high"))
        assert ((low <= share) & (share <= high)).all()
    assert found["groups"]["a"]["left"] == [6, 9]
    assert found["groups"]["a"]["p"] is None
    expected = scipy_stats.chi2.sf(log_rank(A, B), 1)
    assert found["groups"]["b"]["p"] == pytest.approx(expected, rel=1e-9)
    assert found["p"] == pytest.approx(expected, rel=1e-9)
    assert survival.compare({"a": [Life(5, False)] * 3})["p"] is None
    assert survival.compare({"a": [Life(5, False)] * 3, "b": [Life(5, False)]})["p"] is None


def fallen(tau, seed, at):
    """A run of 40 iterations whose accuracy is lost in one of them; None: in none."""
    run = run_of(tau, seed, 0.5)
    for record in run.records[1:]:
        record["reward/accuracy"] = 0.1 if at and record["iteration"] >= at else 0.8
    return run


def test_a_page_with_collapse_curves(tmp_path):
    """Of the second setting all runs collapse; where lifelines is not there, the page goes on."""
    runs = [fallen(1.0, seed, None) for seed in range(3)]
    runs += [fallen(2.0, seed, 5 + seed) for seed in range(3)]
    runs = [run._replace(config={"collapse": {"window": 3}}) for run in runs]
    found = sweep_stats.summarise(runs)
    assert [run["collapse_reward"] for run in found["settings"][1]["runs"]] == [6, 7, 8]
    assert sweep_stats.life(runs[3]) == Life(6, True)
    assert sweep_stats.life(runs[0]) == Life(20, False)
    (tmp_path / "report.json").write_text(json.dumps(found))
    text = sweep.write(tmp_path).read_text()
    there = found["survival"] is not None
    assert ('id="survival"' in text) == ("log-rank p" in text) == there
    assert there == (importlib.util.find_spec("lifelines") is not None)
    if there:
        assert "<td>3 of 3</td>" in text
        assert "<td>0 of 3</td>" in text


def test_without_lifelines_there_are_no_curves(monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines", None)
    assert survival.compare({"a": A, "b": B}) is None
