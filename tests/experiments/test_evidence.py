"""The experiments on the paper's claims: what is written follows from what was measured."""

import functools
import importlib
import itertools
import json
import math

import numpy as np
import pytest

from experiments.evidence import pages, paper, policy, stats, store, study, sweeps
from experiments.evidence.study import Claim, Exact
from experiments.gates import run as gates
from experiments.weakest_assumption import run as weakest
from sapo_jax.gradlab import UNGATED
from sapo_jax.report.sweep_stats import Run
from sapo_jax.training import bootstrap

NAMES = (*pages.STUDIES, *pages.WITHOUT_CLAIMS)
WITH_RESULTS = [n for n in NAMES if any((study.ROOT / n / "results").glob("*.json.gz"))]


def test_the_sign_flip_test_is_the_binomial_one_for_equal_sizes():
    """k of n equal differences with the same sign; nothing is below 2^(1−n)."""
    assert stats.sign_flip([1.0] * 8) == 2 / 2**8
    for minus in range(4):
        tail = sum(math.comb(7, k) for k in range(minus + 1))
        assert stats.sign_flip([-1.0] * minus + [1.0] * (7 - minus)) == 2 * tail / 2**7
    assert stats.sign_flip([0.0, 0.0]) == 1.0


def test_signs_are_drawn_where_there_are_too_many_to_try_all():
    """To 4 standard errors of as many draws, the p of all 2^18 assignments."""
    x_N, sums = np.random.default_rng(1).normal(0.3, 1, 18), np.zeros(1)
    for x in x_N:
        sums = np.concatenate([sums + x, sums - x])
    p = np.mean(np.abs(sums) >= abs(x_N.sum()) * (1 - 1e-12))
    error = 4 * math.sqrt(p * (1 - p) / stats.RESAMPLES)
    assert 0.01 < p < 0.2
    assert stats.sign_flip(x_N) == pytest.approx(p, abs=error)


def test_a_difference_is_that_of_the_seeds_that_both_have():
    """The first minus the second."""
    found = stats.difference(
        {0: 0.5, 1: 0.75, 2: 0.5, 4: 9.0}, {2: 0.25, 0: 0.125, 1: 0.25, 3: 9.0}
    )
    assert found == stats.effect([0.375, 0.5, 0.25])
    assert (found.seeds, found.mean, found.size) == (3, 0.375, 3.0)


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
    assert first["p"] == 0.0234  # 3 · 2/2⁸ in 3 digits: d is not measured, and counts
    assert (first["verdict"], second["verdict"]) == (stats.SUPPORTED, stats.UNDECIDED)
    assert (third["verdict"], fourth["verdict"]) == (stats.CONTRADICTED, study.NOT_RUN)


def test_seeds_and_then_their_draws_are_resampled():
    """With estimates that have no error of their own it is the bootstrap over seeds."""
    points = [0.1, 0.3, -0.1, 0.2, 0.4, 0.0]
    plain = stats.effect(points)
    same = stats.hierarchical([[p] * 5 for p in points], points)
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high), rel=1e-12)  # f64
    rng = np.random.default_rng(0)
    noisy = stats.hierarchical([rng.normal(p, 1, 200).tolist() for p in points], points)
    normal = 2 * bootstrap.Z * math.sqrt((np.var(points) + 1) / len(points))
    # The error of two quantiles of 2000 draws, and of the variance of 6 × 200 ones: 2% each.
    assert noisy.high - noisy.low == pytest.approx(normal, rel=0.08)
    assert noisy.mean == plain.mean
    assert stats.hierarchical([[0.0, 1.0]] * 2, [0.4, 0.6]).low is None


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
    lives = [0.5, 0.1, 0.1, 0.1], [0.5] * 4, [0.5, 0.5, 0.5, 0.1], [0.5, 0.5, 0.1, 0.1]
    runs = [run_of(0, 1.0, [0.1] * 5, accuracy=accuracy) for accuracy in lives]
    assert sweeps.collapsed(runs) == "3 of 4, iteration 3"
    assert sweeps.collapsed(runs[1:2]) == "0 of 1"


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


def by_minibatches(section, run):
    """SAPO is better than GRPO with 4 minibatches alone, and R3 is worse there."""
    name, replayed = run["objective.name"], run.get("learner.routing_replay") == "R3"
    if section == "minibatches_4":
        return (name == "sapo") - 3 * replayed
    return (name == "vespo") + replayed


def by_temperature(_, run):
    """The constant (10, 12) is better than the others, and schedules are worse."""
    constant = {1.05: 1, 12.0: 2}.get(run["objective.tau_neg"], 0)
    return -3 if "objective.schedule" in run else constant


def by_gate(_, run):
    """Sharp gates are better at SAPO's width, and worse at the same τ in the study's notation."""
    tau = run["objective.tau_pos"]
    width = {1.0: 0, 10.0: 1}.get(tau, -2 if tau > 9 else 4)
    return width + (run["objective.name"] in ("sapo_erf", "sapo_arctan"))


BETTER = {  # by the claims of each experiment: what raises the Pass@1 of a run, and that it lasts
    "algorithm_comparison": lambda section, run: run["objective.name"] == "sapo",
    "staleness": by_minibatches,
    "temperature_ablation": by_temperature,
    "multi_task": lambda section, run: (section, run["objective.name"]) == ("fixed", "sapo"),
    "gate_families": by_gate,
    "aggregation": lambda section, run: run["objective.aggregation"] != "seq_mean",
}
LONG = "eval/long/pass_at_1"
TASKS = (*policy.TERMS, *policy.SEVERAL)
KEYS = ["eval/pass_at_1", *(f"eval/{task}/pass_at_1" for task in TASKS)]


def made(section, better, differ):
    """Results of a section whose runs are as one of BETTER says, in the keys that differ."""
    runs, config = [], section.config.to_dict()
    last, stored = config["iterations"], {field: config[field] for field in store.FIELDS}
    evaluated = list(range(0, last + 1, config["eval"]["every"]))
    for overrides in section.sweep:
        more, seed = better(overrides), overrides["seed"]
        until = last if more > 0 else last // 2 - seed % 3
        accuracy = [0.5 * (i <= until) for i in range(1, last + 1)]
        passes = {key: 0.5 + 0.1 * more * (key in differ) + 0.001 * seed for key in KEYS}
        curves = {key: [evaluated, [value] * len(evaluated)] for key, value in passes.items()}
        curves["reward/accuracy"] = [list(range(1, last + 1)), accuracy]
        curves["time/iteration"] = [[1], [1.0]]
        runs.append({"name": "", "overrides": overrides, "config": stored, "curves": curves})
    return {"runs": runs, "provenance": []}


def supported(name, results):
    """The claims of an experiment that are, by its report; others must be undecided."""
    own = pages.study(name)
    found = study.verdicts(own.claims, own.report(results).effects)
    verdicts = {row["name"]: row["verdict"] for row in found}
    assert set(verdicts.values()) <= {stats.SUPPORTED, stats.UNDECIDED}
    return {claim for claim, verdict in verdicts.items() if verdict == stats.SUPPORTED}


@pytest.mark.parametrize("name", BETTER)
def test_claims_hold_in_runs_that_are_as_they_say(name):
    """An effect of the opposite sign, or of other runs, would contradict its claim or be none."""
    module, better = importlib.import_module(f"experiments.{name}.run"), BETTER[name]

    def results(differ):
        sections = module.sections("default").items()
        return {k: made(s, functools.partial(better, k), differ) for k, s in sections}

    claims = {claim.name for claim in module.CLAIMS}
    assert supported(name, results(KEYS)) == claims
    for endpoint, differ in (("last", []), ("long", [LONG])):  # by its own endpoint alone
        own = {claim for claim in claims if claim.startswith(endpoint)}
        assert not own or supported(name, results(differ)) == own


def test_what_gates_remove_counts_by_the_updates_since_sampling():
    """Points of training without a value are left out, as are gates that removed nothing."""

    def entry(value):
        draws = (value + rng.normal(0, 0.01, 20)).tolist() if value is not None else None
        return {"value": value} if value is None else {"value": value, "draws": draws}

    def stage(updates, removed, helps):
        """As the lab says it, with the bare ratio's gradients before the others."""
        names = [*UNGATED.values(), "sapo", "grpo", "gspo"]
        helped = [{"value": 0.7, "difference": entry(x)} for x in (0.0, 0.0, helps, None, None)]
        gone = [entry(x) for x in (None, None, removed, None, None)]
        mass = [0.0, 0.0, 0.1, 0.0, 0.0]
        gradients = {"names": names, "fidelity": {"reward": helped},
                     "removed": {"reward": gone, "mass": mass}}  # fmt: skip
        return {"updates": updates, "reward": 0.5, **weakest._of(gradients)}

    rng = np.random.default_rng(0)
    stages = [
        {"seed": s, "point": p, "stages": [stage(3, r, -0.1), stage(15, -0.2, 0.1)]}
        for s in range(8) for p, r in ((4, -0.1), (24, None), (48, -0.2 - 0.01 * s))
    ]  # fmt: skip
    page = weakest.report({"stages": stages})
    found = {name: round(effect.mean, 6) for name, effect in page.effects.items()}
    assert found == {"removed first": -0.1675, "removed last": -0.2, "helps last": 0.1}
    assert supported("weakest_assumption", {"stages": stages}) == set(found)
    (table,) = page.tables.values()
    assert "| sapo | 3 | 4 | 8 | 10.00% | −0.10 (" in table
    assert "| sapo | 3 | 24 |" not in table


def test_bounds_are_of_each_sequence():
    """With τ²/4: one in four of the dense ones is above by a fifth, for the gate in use."""

    def seed(var, above):
        tau, var = np.array([1.0, 1.05] * 4), np.array([var] * 8)
        d = tau**2 / 4 * var
        gate = d * np.where(np.arange(8) < above, 1.2, 0.9)
        found = {"tau": tau, "var": var, "d_log": d + 5e-7, "d_gate": gate}  # by rounding
        return {k: v.tolist() for k, v in found.items()} | {"ratios": [0, *[1] * 100, 0]}

    cells = {
        f"{kind}/{n}": [seed(*of) for _ in range(8)]
        for kind, of in (("mixture of experts", (0.01, 0)), ("the same, R3", (0.03, 0)),
                         ("dense", (0.001, 2)))
        for n in (4, 16)
    }  # fmt: skip
    effects = pages.study("assumption_validation").report({"sequences": cells}).effects
    share = "{:.2%} of 384 sequences above".format
    assert effects["theorem"] == Exact(True, share(0))
    assert effects["gate"] == Exact(False, f"{share(1 / 12)}, by a factor of up to 1.20")
    assert effects["small"] == Exact(True, "100.0% of 64 sequences")
    assert effects["sparse"].mean == pytest.approx(1)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_tables_and_verdicts_follow_from_the_results(name):
    """Byte for byte; the sizes of what is stored are bounded."""
    own, page, out = pages.study(name), pages.page(name), study.ROOT / name / "results"
    assert own.tables(page) == (out / "table.md").read_text()
    assert sum(p.stat().st_size for p in out.rglob("*")) < 5 * 2**20
    measured = study.verdicts(own.claims, page.effects)
    assert measured == json.loads((out / "verdicts.json").read_text())


def test_what_the_pages_say_was_measured():
    """Otherwise: python -m experiments.evidence.pages. A page without marks would never change."""
    for path, text in pages.files():
        assert path.read_text() == text, path
        if path != study.ROOT.parent / "README.md":  # which has no table yet
            marks = ["protocol", "result"] if path.parent.name in NAMES else ["claims"]
            assert all(f"<!-- {mark} -->" in text for mark in marks), path


def test_gates_are_figure_1_and_the_two_facts_that_it_leaves_out():
    """By the closed forms, to the last of the digits that are stored."""

    def weight(r, tau):
        return 1 / np.cosh(tau * (r - 1) / 2) ** 2

    found = store.read(study.ROOT / "gates/results/gates.json.gz")
    ratios = np.array(found["ratios"])
    for tau in (1, 2, 3):
        assert found["figure_1"][f"τ = {tau}"]["w"] == store.rounded(weight(ratios, tau).tolist())
    hard = np.array(found["figure_1"]["hard clip, ε = 1"]["w"])
    assert (hard[ratios < 2] == 1).all()
    assert (hard[ratios > 2] == 0).all()
    for side, tau, largest in (("positive", 1.0, 1.575), ("negative", 1.05, 1.536)):
        own, c = found["presets"]["sapo"][side], gates.FINE * weight(gates.FINE, tau)
        assert own["max"] == store.rounded(float(c.max()))
        assert round(own["max"], 3) == largest
        above = gates.FINE[c > 1 + 1e-9]
        assert own["above_1"] == store.rounded([float(above[0]), float(above[-1])])
    assert not gates.effects(found)["attenuates"].holds


def test_what_is_stored_of_the_gates_is_what_the_library_computes():
    found = store.read(study.ROOT / "gates/results/gates.json.gz")
    assert set(found["presets"]) == set(gates.OBJECTIVES)
    for name in ("sapo", "grpo_r2", "gmpo"):
        both = gates.coefficients(gates.named(name), np.array(gates.TABLE))
        for side, c in zip(gates.SIDES, both, strict=True):
            assert store.rounded(c.tolist()) == found["presets"][name][side]["at_table"]


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
