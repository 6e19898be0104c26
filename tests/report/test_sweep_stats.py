"""What a sweep's report says: pairing by seed, the rule of collapse, grids, and the page."""

import json
import re

import numpy as np
import pytest

from sapo_jax.report import sweep, sweep_plots, sweep_stats
from sapo_jax.report.sweep_stats import Run


def records(reward, *, ends=0.5, entropy=None, broken=None):
    """A run's records: rewards by iteration, evaluations at its start and end."""
    out = [{"iteration": 0, "eval/pass_at_1": 0.1, "eval/aime25/pass_at_1": 0.2}]
    for i, value in enumerate(reward, 1):
        out.append({
            "iteration": i,
            "reward/mean": float(value),
            "reward/accuracy": float(value),
            "policy/entropy": float(1.0 if entropy is None else entropy[i - 1]),
            "policy/loss": None if i == broken else 0.0,
            "update/skipped": int(i == broken),
            "length/mean": 5.0,
            "time/iteration": 36.0,
        })  # fmt: skip
    out[-1] |= {"eval/pass_at_1": ends, "eval/aime25/pass_at_1": ends / 2}
    return out


def run_of(tau, seed, ends, **more):
    overrides = {"objective.tau_neg": tau, "seed": seed}
    return Run(
        f"{tau}-{seed}", f"d/{tau}-{seed}", overrides, records(np.ones(20), ends=ends, **more)
    )


def test_settings_are_compared_seed_by_seed():
    """A constant gain shows with an interval of no width, however much the seeds differ."""
    ends = {0: 0.2, 1: 0.5, 2: 0.9}
    runs = [run_of(t, s, ends[s] + g) for t, g in ((1.0, 0.0), (2.0, 0.05)) for s in (2, 0, 1)]
    found = sweep_stats.summarise(runs[:3] + runs[3:][::-1])  # in another order of seeds
    first, second = found["settings"]
    assert first["difference"] is None
    difference = second["difference"]
    assert difference["pairs"] == 3
    for key in ("mean", "low", "high"):
        assert difference[key] == pytest.approx(0.05)
    assert difference["better"] == 1
    assert second["pass_at_1"]["high"] - second["pass_at_1"]["low"] > 0.3
    assert found["hours"] == pytest.approx(6 * 20 * 36 / 3600)


def test_a_cold_start_for_each_seed_is_no_setting():
    """init_from that follows from the seed leaves pairs; one that does not is compared."""
    follows = [{"seed": s, "init_from": f"cold-{s}", "x": x} for x in (1, 2) for s in (0, 1)]
    assert sweep_stats.replicate_fields(follows) == {"seed", "init_from"}
    crossed = [{"seed": s, "init_from": d} for d in "ab" for s in (0, 1)]
    assert sweep_stats.replicate_fields(crossed) == {"seed"}


def test_collapse_is_for_good():
    """A dip that recovers is none; a fall to under half of the best is, at the first such step."""
    steady, dip = np.full(100, 0.8), np.full(100, 0.8)
    dip[40:55] = 0.1
    fall = np.r_[np.linspace(0, 0.8, 60), np.full(40, 0.1)]
    assert sweep_stats.collapse(records(steady))["reward"] is None
    assert sweep_stats.collapse(records(dip))["reward"] is None
    step = sweep_stats.collapse(records(fall))["reward"]
    assert 61 < step <= 70  # the running mean is over 10 iterations
    assert sweep_stats.collapse(records(0.01 * fall))["reward"] is None  # nothing was learnt
    entropy = np.r_[np.full(50, 2.0), np.full(50, 0.05)]
    assert 50 < sweep_stats.collapse(records(steady, entropy=entropy))["entropy"] <= 60
    found = sweep_stats.collapse(records(steady, broken=7))
    assert found == {"reward": None, "entropy": None, "finite": 7}
    empty = records(steady)
    empty[5] |= {"policy/loss": None, "grad/norm": None}
    assert sweep_stats.collapse(empty)["finite"] is None  # no group had a signal, or none had ended
    del empty[5]["update/skipped"]
    assert sweep_stats.collapse(empty)["finite"] == empty[5]["iteration"]  # a run of before
    shares = sweep_stats.collapses([run_of(1.0, 0, 0.5), run_of(1.0, 1, 0.5, broken=3)])
    assert shares["finite"] == {"share": 0.5, "median": 3.0, "steps": [3]}


def test_a_curve_is_the_mean_over_what_all_runs_have():
    runs = [run_of(1.0, s, ends) for s, ends in ((0, 0.2), (1, 0.3), (2, 0.4))]
    runs[1].records.insert(1, {"iteration": 3, "eval/pass_at_1": 0.9})
    curve = sweep_stats.curve(runs, "eval/pass_at_1")
    assert curve["iteration"] == [0, 20]
    np.testing.assert_allclose(curve["mean"], [0.1, 0.3])
    assert curve["low"][1] == pytest.approx(0.2)
    assert curve["high"][1] == pytest.approx(0.4)


def test_two_seeds_have_no_interval(tmp_path):
    """A "95%" of resamples of two values is their range, whatever they are."""
    runs = [run_of(t, s, 0.2 + 0.4 * s + t / 10) for t in (1.0, 2.0) for s in (0, 1)]
    found = sweep_stats.summarise(runs)
    for entry in found["settings"]:
        bounds = [entry["pass_at_1"], *([entry["difference"]] if entry["difference"] else [])]
        for each in bounds:
            assert each["mean"] is not None
            assert each["low"] is each["high"] is None
    assert set(found["settings"][0]["curves"]["reward/mean"]["low"]) == {None}
    (tmp_path / "report.json").write_text(json.dumps(found))
    text = sweep.write(tmp_path).read_text()
    assert ">50.0<" in text
    assert "50.0 (" not in text
    sweep.picture(tmp_path, tmp_path / "p.png")


TIES = [
    ([[0.5, 0.6, 0.7], [0.5, 0.6, 0.7]], 2),  # the same
    ([[0.5, 0.6, 0.7], [0.7, 0.5, 0.61]], 2),  # seeds disagree
    ([[0.5, 0.6], [0.7, 0.8]], 2),  # two pairs tell nothing apart
    ([[0.5, 0.6, 0.7], [0.6, 0.7, 0.8]], 1),
    ([[0.6, 0.7, 0.8], [0.5, 0.6, 0.7], [0.6, 0.7, 0.8]], 2),
]


@pytest.mark.parametrize(("ends", "count"), TIES)
def test_a_tie_has_no_crown(ends, count, tmp_path):
    """The first of equal settings was "best"; now a best is ahead of the others seed by seed."""
    runs = [run_of(float(t), s, e) for t, each in enumerate(ends, 1) for s, e in enumerate(each)]
    found = sweep_stats.summarise(runs)
    assert len(sweep_stats.leaders(found["settings"])) == count
    (tmp_path / "report.json").write_text(json.dumps(found))
    text = sweep.write(tmp_path).read_text()
    assert ("Best mean Pass@1" in text) == (count == 1)
    assert ("not told apart by their seeds: " in text) == (count > 1)


def test_grids_of_two_dimensional_sweeps():
    """τ × seed, or two fields with the mean over seeds; a sweep with holes has none."""
    runs = [run_of(t, s, 0.1 * s + t / 10) for t in (1.0, 2.0) for s in (0, 1, 2)]
    rows, columns, table = sweep_plots.grid(sweep_stats.summarise(runs))
    assert rows == ("objective.tau_neg", [1.0, 2.0])
    assert columns == ("seed", [0, 1, 2])
    np.testing.assert_allclose(table, [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    assert sweep_plots.grid(sweep_stats.summarise(runs[:-1])) is None
    both = [
        r._replace(overrides={**r.overrides, "learner.learning_rate": rate})
        for r in runs
        for rate in (1e-3, 1e-2)
    ]
    rows, columns, table = sweep_plots.grid(sweep_stats.summarise(both))
    assert columns == ("learner.learning_rate", [1e-3, 1e-2])
    np.testing.assert_allclose(table, [[0.2, 0.2], [0.3, 0.3]])


def test_the_report_of_a_sweep(tmp_path):
    """A page with every panel, without scripts or links elsewhere, and its numbers as JSON."""
    runs = [run_of(t, s, 0.1 * s + t / 10, broken=4) for t in (1.0, 2.0) for s in (0, 1, 2)]
    listed = [{"name": r.name, "directory": r.directory, "overrides": r.overrides} for r in runs]
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": listed}))
    for run in runs:
        path = tmp_path / run.directory / "metrics" / "part-00000.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in run.records))
    text = sweep.write(tmp_path).read_text()
    for panel in (
        "pass",
        "reward",
        "entropy",
        "ends",
        "differences",
        "heat",
        "collapse",
        "evaluations",
    ):
        assert f'id="{panel}"' in text, panel
    assert "+10.0 (+10.0 to +10.0)" in text
    assert "<th>aime25</th>" in text
    assert re.search(r"<td>tau_neg 1.0</td><td>10.0 \(", text)
    assert 'href="d/1.0-0/report.html"' in text
    assert "<script" not in text
    assert "<image" not in text  # refused by the page's own policy
    assert "http" not in text.replace("http://www.w3.org", "").replace("http-equiv", "")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == json.loads(json.dumps(sweep_stats.summarise(runs)))
    sweep.picture(tmp_path, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
