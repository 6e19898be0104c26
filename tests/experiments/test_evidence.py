"""The experiments on the paper's claims: what is written follows from what was measured."""

import itertools
import json
import math

import numpy as np
import pytest

from experiments.evidence import pages, paper, stats, store, study, sweeps
from experiments.evidence.study import Claim, Exact
from experiments.gates import run as gates
from sapo_jax.report.sweep_stats import Run

NAMES = (*pages.STUDIES, pages.PILOTS)
WITH_RESULTS = [n for n in NAMES if any((study.ROOT / n / "results").glob("*.json.gz"))]


def test_the_sign_flip_test_is_the_binomial_one_for_equal_sizes():
    """k of n equal differences with the same sign; nothing is below 2^(1−n)."""
    assert stats.sign_flip([1.0] * 8) == 2 / 2**8
    for minus in range(4):
        tail = sum(math.comb(7, k) for k in range(minus + 1))
        assert stats.sign_flip([-1.0] * minus + [1.0] * (7 - minus)) == 2 * tail / 2**7
    assert stats.sign_flip([0.0, 0.0]) == 1.0
    many = np.random.default_rng(1).normal(0.5, 1, 24)
    assert 0 < stats.sign_flip(many) < 0.1


def test_holm_is_monotone_and_never_below_p():
    """The textbook's example; the order of the family does not matter."""
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    found = {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    for order in itertools.permutations(p):
        assert stats.holm({k: p[k] for k in order}) == pytest.approx(found)


def test_verdicts_follow_from_interval_and_test():
    """Either alone decides nothing; the claimed sign decides between the other two."""
    clear = stats.effect([0.1, 0.12, 0.09, 0.11, 0.1, 0.13, 0.08, 0.1])
    assert stats.verdict(clear, 0.01, 1) == stats.SUPPORTED
    assert stats.verdict(clear, 0.01, -1) == stats.CONTRADICTED
    assert stats.verdict(clear, 0.06, 1) == stats.UNDECIDED
    wide = stats.effect([0.3, -0.29, 0.31, -0.3])
    assert stats.verdict(wide, 0.001, 1) == stats.UNDECIDED
    two = stats.effect([0.1, 0.2])
    assert two.low is None
    assert stats.verdict(two, 0.001, 1) == stats.UNDECIDED


def test_a_family_is_corrected_together():
    values = {"a": [0.1] * 7 + [0.2], "b": [0.1, -0.1, 0.2, -0.2]}
    effects = {name: stats.effect(v) for name, v in values.items()} | {"c": Exact(False, "no")}
    claims = [Claim(name, name, "here") for name in "abcd"]
    first, second, third, fourth = study.verdicts(claims, effects)
    assert first["p"] == pytest.approx(3 * 2 / 2**8, rel=1e-2)  # d is not measured, and counts
    assert (first["verdict"], second["verdict"]) == (stats.SUPPORTED, stats.UNDECIDED)
    assert (third["verdict"], fourth["verdict"]) == (stats.CONTRADICTED, study.NOT_RUN)


def test_seeds_and_then_their_draws_are_resampled():
    """With estimates that have no error of their own it is the bootstrap over seeds."""
    points = [0.1, 0.3, -0.1, 0.2, 0.4, 0.0]
    plain = stats.effect(points)
    same = stats.hierarchical([[p] * 5 for p in points], points)
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high), abs=0.02)
    rng = np.random.default_rng(0)
    noisy = stats.hierarchical([rng.normal(p, 1, 200).tolist() for p in points], points)
    assert noisy.high - noisy.low > 2 * (same.high - same.low)
    assert noisy.mean == plain.mean


def run_of(seed, rate, passes, iterations=4, accuracy=()):
    records = [{"iteration": i, "eval/pass_at_1": p} for i, p in enumerate(passes)]
    for record, value in zip(records[1:], accuracy, strict=False):
        record["reward/accuracy"] = value
    overrides = {"learner.learning_rate": rate, "seed": seed}
    config = {"iterations": iterations, "eval": {"every": 1}, "collapse": {"window": 1}}
    return Run("", "", overrides, records, config)


def test_a_run_that_stopped_counts_as_nothing_after():
    assert sweeps.late(run_of(0, 1.0, [0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(0.4)
    assert sweeps.late(run_of(0, 1.0, [0.1, 0.2, 0.3])) == pytest.approx(0.1)


def test_how_long_a_run_lasts():
    assert sweeps.lasted(run_of(0, 1.0, [0.1] * 5, accuracy=[0.5, 0.5, 0.1, 0.1])) == 0.75
    assert sweeps.lasted(run_of(0, 1.0, [0.1] * 5, accuracy=[0.5, 0.1, 0.5, 0.5])) == 1


def test_a_seed_has_no_say_in_its_learning_rate():
    """Seed 0 alone is better at rate 2: it is judged at 1, and the others, by its say, at 2."""
    runs = [
        run_of(seed, rate, [0.0] * 2 + [own] * 3)
        for seed in range(3)
        for rate, own in ((1.0, 0.5), (2.0, 0.9 if seed == 0 else 0.2))
    ]
    assert sweeps.best_rate(runs) == pytest.approx({0: 0.5, 1: 0.2, 2: 0.2})


def test_curves_come_back_as_they_were(tmp_path):
    """And the file's bytes are those of the curves, at any time and by any name."""
    stored = {"runs": [{
        "name": "a", "overrides": {"seed": 1}, "config": {"iterations": 2},
        "curves": {"reward/mean": [[1, 2], [0.5, None]], "eval/pass_at_1": [[0, 2], [0.1, 0.2]]},
    }], "provenance": []}  # fmt: skip
    for name in ("one.json.gz", "two.json.gz"):
        store.write(tmp_path / name, stored)
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    (run,) = store.runs_of(store.read(tmp_path / "one.json.gz"))
    assert run.records == [
        {"iteration": 0, "eval/pass_at_1": 0.1}, {"iteration": 1, "reward/mean": 0.5},
        {"iteration": 2, "eval/pass_at_1": 0.2, "reward/mean": None},
    ]  # fmt: skip
    assert store.rounded({"a": [0.1234567, 3, None]}) == {"a": [0.12346, 3, None]}


def test_the_papers_curves_are_those_of_its_table():
    (_, steps, values), *_ = paper.points(paper.read("figure_5"), "training reward")
    assert dict(zip(steps, values, strict=True))[1250] == 0.799
    for name in ("figure_4", "figure_5", "figure_6"):
        found = paper.read(name)
        for panel in found["panels"]:
            for _, steps, values in paper.points(found, panel):
                assert steps == sorted(steps)
                assert all(0 < value < 1 for value in values)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_tables_and_verdicts_follow_from_the_results(name):
    """Byte for byte; the sizes of what is stored are bounded."""
    own, out = pages.study(name), study.ROOT / name / "results"
    page = own.page(out)
    assert own.tables(page) == (out / "table.md").read_text()
    assert sum(p.stat().st_size for p in out.rglob("*")) < 5 * 2**20
    measured = study.verdicts(own.claims, page.effects)
    assert measured == json.loads((out / "verdicts.json").read_text())


def test_what_the_pages_say_was_measured():
    """Otherwise: python -m experiments.evidence.pages."""
    for path, text in pages.files():
        assert path.read_text() == text, path


def test_gates_are_figure_1_and_the_two_facts_that_it_leaves_out():
    found = store.read(study.ROOT / "gates/results/gates.json.gz")
    ratios = np.array(found["ratios"])
    for tau in (1, 2, 3):
        closed = 1 / np.cosh(tau * (ratios - 1) / 2) ** 2
        np.testing.assert_allclose(found["figure_1"][f"τ = {tau}"]["w"], closed, rtol=1e-4)
    hard = np.array(found["figure_1"]["hard clip, ε = 1"]["w"])
    assert (hard[ratios < 1.99] == 1).all()
    assert (hard[ratios > 2.01] == 0).all()
    sapo = found["presets"]["sapo"]
    assert sapo["positive"]["max"] == pytest.approx(1.575, abs=5e-4)
    assert sapo["negative"]["max"] == pytest.approx(1.536, abs=5e-4)
    assert sapo["positive"]["above_1"] == pytest.approx([1, 3.47], abs=5e-3)
    assert not gates.effects(found)["attenuates"].holds


def test_what_is_stored_of_the_gates_is_what_the_library_computes():
    found = store.read(study.ROOT / "gates/results/gates.json.gz")
    assert set(found["presets"]) == set(gates.OBJECTIVES)
    for name in ("sapo", "grpo_r2", "gmpo"):
        both = gates.coefficients(gates.named(name), np.array(gates.TABLE))
        for side, c in zip(gates.SIDES, both, strict=True):
            np.testing.assert_allclose(c, found["presets"][name][side]["at_table"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_in_small_and_reports_again(name, tmp_path):
    """The command of each; what it writes follows from the results alone."""
    own = pages.study(name)
    arguments = ["run", "--size=smoke", f"--workdir={tmp_path / name}"]
    arguments += ["--jobs=2"] * (name == "staleness")
    own.main(own.flags("").parse(arguments))
    out = tmp_path / name / "results"
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"table.md", "verdicts.json"} <= set(written)
    own.main(own.flags("").parse([*arguments, "--report_only"]))
    assert written == {path.name: path.read_bytes() for path in out.iterdir()}
