"""The report must say what the run directory holds, and no more, whatever a model wrote into it."""

import json
import re
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest

from sapo_jax import cli
from sapo_jax.report import __main__, page, run_plots, style
from sapo_jax.report import run as report
from sapo_jax.training import provenance, workdir

HOSTILE = "</script><script>alert(1)</script>"
SECTIONS = {"learning", "policy", "ratios", "time", "preflight", "samples", "config"}
VOID = {"meta", "col", "br", "link", "img", "input"}
TITLED = ("h3", "figcaption")
RATIO_EDGES, GATE_EDGES = np.linspace(-2, 2, 81), np.linspace(0, 1.25, 51)


def _histogram(values, edges):
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _ratios(rng, spread):
    """Histograms of log r and w as SAPO has them, and the numbers that go with them."""
    record = {}
    for sign, tau, skew in (("pos", 1.0, 0.3), ("neg", 1.1, -0.3)):
        log_ratio = spread * np.clip(rng.standard_t(3, 6000) + skew, -20, 20)
        log_ratio[:1500] = 0
        gate = 1 / np.cosh(tau * np.expm1(log_ratio) / 2) ** 2
        record[f"histogram/log_ratio_{sign}"] = _histogram(log_ratio, RATIO_EDGES)
        record[f"histogram/gate_{sign}"] = _histogram(gate, GATE_EDGES)
    spreads = spread * np.arange(4)
    record["minibatch"] = [
        {
            "policy/ratio_max": float(np.exp(s * rng.uniform(4, 8))),
            "policy/ratio_min": float(np.exp(-s * rng.uniform(4, 8))),
            "grad/norm": float(rng.uniform(0.5, 1)),
        }
        for s in spreads
    ]
    record["policy/ratio_max"] = max(m["policy/ratio_max"] for m in record["minibatch"])
    record["policy/ratio_min"] = min(m["policy/ratio_min"] for m in record["minibatch"])
    record["policy/gate_mean"] = 1 - 1.5 * spread**2 * rng.uniform(0.9, 1.1)
    record["policy/clipped"] = 0.0
    record["policy/kl_old"] = spread**2 * rng.uniform(0.8, 1.2)
    return record


def _record(rng, iteration, iterations, supervised):
    grown = 1 / (1 + np.exp(-8 * (iteration / max(iterations, 2) - 0.45)))
    record = {
        "iteration": iteration,
        "update": 4 * iteration,
        "policy/entropy": 0.9 - 0.6 * grown + rng.normal(0, 0.02),
        "policy/loss": (2.2 - 1.9 * grown if supervised else -0.02) + rng.normal(0, 0.02),
        "grad/norm": float(np.exp(rng.normal(-0.5, 0.3))),
        "learning_rate": 1e-4,
        "time/update": 1.6 + rng.normal(0, 0.05),
        "time/checkpoint": 0.4 if iteration % 50 == 0 else 0.0,
        "time/eval": 0.0,
    }
    if iteration % 10 == 0 or iteration == 1:
        solved = 0.12 + 0.7 * grown + rng.normal(0, 0.01)
        record["time/eval"] = 2.5
        record["eval/pass_at_1"] = solved
        record["eval/pass_at_8"] = solved + 0.1
        record["eval/pass_at_1_low"] = solved - 0.04
        record["eval/pass_at_1_high"] = solved + 0.04
        for name, easier in (("aime25", -0.05), ("hmmt25", 0.05)):
            own = f"eval/{name}/pass_at_1"
            record |= {own: solved + easier, f"{own}_low": solved, f"{own}_high": solved + 0.1}
    record |= _ratios(rng, 0.05 + 0.12 * grown)
    record |= {"length/mean": 22 + 30 * grown, "sampler/logp_gap_mean": 1e-6}
    if not supervised:
        record |= {
            "reward/mean": 0.1 + 0.7 * grown + rng.normal(0, 0.05),
            "reward/std": 0.4,
            "sampler/logp_gap_mean": float(np.exp(rng.normal(-14, 0.2))),
            "sampler/logp_gap_max": float(np.exp(rng.normal(-12, 0.3))),
            "length/mean": 22 + 30 * grown + rng.normal(0, 2),
            "length/truncated": max(0.0, 0.12 - 0.1 * grown + rng.normal(0, 0.01)),
            "advantage/zero_groups": 0.6 - 0.5 * 4 * grown * (1 - grown) + rng.normal(0, 0.04),
            "histogram/age": {"edges": [-0.5, 0.5, 1.5, 2.5], "counts": [60, 40 * iteration, 0]},
            "policy/eur_pos": 0.95,
            "policy/eur_neg": 0.9,
            "ratio/ess": 0.98,
            **{f"coefficient/{s}_{p}": 0.25 for s in ("pos", "neg") for p in ("below", "above")},
            "ratio/var_mean": 0.01,
            "ratio/var_p99": 0.04,
            "ratio/bound_mean": 0.0026,
            "ratio/d_log_mean": 0.001,
            "ratio/d_gate_mean": 0.002,
            "time/tokens_per_second": rng.normal(18400, 300),
            "time/rollout": 1.8 + 0.9 * grown + rng.normal(0, 0.08),
            "time/score": 0.15,
        }
    phases = ("rollout", "score", "update")
    record["time/iteration"] = 0.08 + sum(record.get(f"time/{phase}", 0) for phase in phases)
    return record


def _samples(rng, iteration):
    for row in range(32):
        a, b = (int(n) for n in rng.integers(10, 99, 2))
        right = bool(rng.random() < 0.7)
        answer = a + b if right else a + b + 10
        work = f"{a} + {b}: units {a % 10} + {b % 10} = {a % 10 + b % 10},\ntens follow.\n#### "
        yield {
            "iteration": iteration,
            "prompt_id": row // 4,
            "sample_index": row % 4,
            "prompt": f"A shop sells {a} apples and then {b} more. How many apples is that?",
            "completion": HOSTILE + "\x00\u202e" if row == 1 else f"{work}{answer}",
            "answer": str(a + b),
            "reward": float(right and row != 1),
            "advantage": 0.8 if right else -1.2,
            "finished": int(row % 7 == 3),
        }


PREFLIGHT = {
    "name": "quickstart", "topology": "v5e:2x2", "mesh": "fsdp=4", "tpu": True, "checks": [],
    "chip": {"hbm": 2**34}, "programs": [], "refused": {"update": "Used 20G of 16G hbm."},
}  # fmt: skip


def make_run(directory, iterations=200, supervised=False, seed=0):
    """Write a run directory as training leaves it, with plausible numbers."""
    rng = np.random.default_rng(seed)
    (directory / "metrics").mkdir(parents=True)
    objective = {"name": "sapo", "tau_pos": None, "tau_neg": 1.1, "kl": "k3", "kl_coef": None}
    config = {
        "name": "cold start" if supervised else "quickstart",
        "seed": 0,
        "source": "demonstrations" if supervised else "rollouts",
        "objective": objective,
        "task": {"name": "sums", "digits": 2, "levels": {"train": [1, 2], "eval": []}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "clip": {"norm": 1.0}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    records = [_record(rng, i, iterations, supervised) for i in range(1, iterations + 1)]
    _write_metrics(directory, records)
    if not supervised:
        (directory / "samples").mkdir()
        for iteration in {max(1, iterations - 10), iterations}:
            lines = map(json.dumps, _samples(rng, iteration))
            (directory / f"samples/iteration-{iteration:06d}.jsonl").write_text("\n".join(lines))
        (directory / "preflight.json").write_text(json.dumps(PREFLIGHT))
    return records


def _write_metrics(directory, records):
    half = len(records) // 2
    for part, some in enumerate((records[:half], records[half:])):
        text = "".join(json.dumps(r, allow_nan=False) + "\n" for r in some)
        (directory / f"metrics/part-{part:05d}.jsonl").write_text(text)


class Page(HTMLParser):
    """Collects ids, tags, attributes and text; insists that tags are balanced."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.attributes, self.words = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "full"
    make_run(directory)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "small"
    make_run(directory, iterations=5)
    return directory


@pytest.fixture(scope="module")
def html(run):
    path = report.write(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def _present(html):
    ids = Page(html).ids
    assert len(ids) == len(set(ids)), "two elements share an id: an SVG shows another's clip path"
    return set(ids) & {*SECTIONS, *run_plots.PLOTS}


def test_page_shows_every_section_of_a_full_run(html):
    assert _present(html) == {*SECTIONS, *run_plots.PLOTS}
    assert re.findall(r'<section id="([^"]*)"', html) == re.findall(r'<a href="#([^"]*)"', html)


def panels_of(html):
    """Each panel's id -> its title, its drawings and its caption."""
    found = re.findall(r'<figure class="card plot[^>]*id="([^"]*)">(.*?)</figure>', html, re.DOTALL)
    words = {}
    for slug, inside in found:
        title, caption = (re.search(rf"<{t}>(.+?)</{t}>", inside, re.DOTALL)[1] for t in TITLED)
        words[slug] = (title, inside.count("<svg"), caption.strip())
    return words


def test_every_panel_has_a_place_a_caption_and_a_drawing(html):
    """A wide panel is drawn once more, narrow enough for a phone."""
    words = panels_of(html)
    assert set(words) == set(run_plots.PLOTS)
    for slug, (title, drawings, caption) in words.items():
        assert title == run_plots.PLOTS[slug].title
        assert drawings == 1 + run_plots.PLOTS[slug].wide
        assert len(caption) > 30


def test_each_evaluation_has_a_row(html, run):
    last = 100 * workdir.read_metrics(run)[-1]["eval/aime25/pass_at_1"]
    assert re.search(rf"<tr><td>aime25</td>(<td>[^<]*</td>){{2}}<td>{last:.1f} \(", html)
    assert "hmmt25</td>" in html


def test_page_loads_nothing_and_runs_nothing(html):
    """One file that can be mailed: a viewer without a network sees the same page."""
    page = Page(html)
    assert "://" not in html
    assert not {"script", "iframe", "object", "embed", "link", "img", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href", "action"}:
            assert value.startswith("#")
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    references = {v[1:] for n, v in page.attributes if n.endswith("href")}
    references |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert references <= set(page.ids)


def test_hostile_completion_stays_text(html):
    """A policy in training writes anything: its text must neither run nor hide."""
    assert "alert(1)" in html
    assert "<script" not in html
    words = "".join(Page(html).words)
    assert HOSTILE in words
    assert "‹U+0000›" in words
    assert "‹U+202E›" in words
    assert not set(html) & {"\x00", "\u202e"}


def test_hostile_strings_elsewhere_stay_text(tmp_path):
    records = make_run(tmp_path / "run", iterations=3)
    _write_metrics(tmp_path / "run", [{**r, HOSTILE: None} for r in records])
    config = {"name": HOSTILE, "task": HOSTILE, "objective": {"name": HOSTILE, HOSTILE: HOSTILE}}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    sample = {"iteration": 1, "prompt": HOSTILE, "answer": HOSTILE, "completion": "\ud800\x7f\t"}
    line = json.dumps({**sample, "reward": None, "prompt_id": HOSTILE, "sample_index": HOSTILE})
    (tmp_path / "run/samples/iteration-000099.jsonl").write_text(line)
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    assert "<script" not in html.lower()
    assert "".join(Page(html).words).count(HOSTILE) >= 8


@pytest.mark.slow
def test_command_line_gives_the_same_bytes(small, monkeypatch, capsys):
    """No clock and no random ids: a report under version control changes only with its run."""
    first = report.write(small).read_bytes()
    monkeypatch.setattr("sys.argv", ["report", str(small)])
    with pytest.raises(SystemExit):
        cli.run(__main__.main, __main__.FLAGS)
    assert capsys.readouterr().out.strip() == str(small / "report.html")
    assert (small / "report.html").read_bytes() == first


def test_summary_is_what_the_records_say(run):
    records = workdir.read_metrics(run)
    numbers = report.summary(records)
    assert numbers["iterations"] == 200
    assert numbers["updates"] == 800
    assert numbers["pass_at_1_first"] == records[0]["eval/pass_at_1"]
    for bound in ("", "_low", "_high"):
        assert numbers[f"pass_at_1_last{bound}"] == records[-1][f"eval/pass_at_1{bound}"]
    rewards = [r["reward/mean"] for r in records]
    assert numbers["window"] == 10
    assert numbers["reward_first"] == pytest.approx(np.mean(rewards[:10]))
    assert numbers["reward_last"] == pytest.approx(np.mean(rewards[-10:]))
    keys = ("time/iteration", "time/eval", "time/checkpoint")
    assert numbers["minutes"] == pytest.approx(sum(r[k] for r in records for k in keys) / 60)
    speed = np.median([r["time/tokens_per_second"] for r in records])
    assert numbers["tokens_per_second"] == pytest.approx(speed)


def test_summary_of_nothing():
    numbers = report.summary([])
    assert numbers["iterations"] == 0
    assert {v for k, v in numbers.items() if k not in ("iterations", "window")} == {None}


def test_evaluation_before_training_counts_as_no_iteration(tmp_path):
    """Iteration 0 is the untrained policy: it holds an evaluation and nothing else."""
    records = make_run(tmp_path / "run", iterations=10, supervised=True)
    records.insert(0, {"iteration": 0, "eval/pass_at_1": 0.01, "time/eval": 6.0})
    numbers = report.summary(records)
    assert numbers["iterations"] == 10
    assert numbers["pass_at_1_first"] == 0.01
    assert numbers["loss_first"] == records[1]["policy/loss"]
    for shown in (records, records[:1]):
        for part in (tmp_path / "run/metrics").iterdir():
            part.unlink()
        _write_metrics(tmp_path / "run", shown)
        html = report.write(tmp_path / "run").read_text(encoding="utf-8")
        assert "pass" in _present(html)


def test_header_names_method_and_numbers(run, html):
    numbers = report.summary(workdir.read_metrics(run))
    head = re.search(r"<header>.*?</header>", html, re.DOTALL)[0]
    words = " ".join(" ".join(Page(head).words).split())
    for expected in ("SAPO", "quickstart", "tau_pos 1.0", "tau_neg 1.1", "seq_mean", "800 updates"):
        assert expected in words
    assert f"{numbers['pass_at_1_first']:.1%} → {numbers['pass_at_1_last']:.1%}" in words
    assert "Not finite" not in words
    assert "kl" not in words


def test_time_shares_add_up_to_the_time_of_the_run(run, html):
    records = workdir.read_metrics(run)
    table = html[html.index('id="shares"') :]
    rows = re.findall(r"<td>(\w+)</td><td[^>]*>([\d.,]+)</td><td[^>]*>([\d.]+)%</td>", table)
    seconds = {phase: float(spent.replace(",", "")) for phase, spent, _ in rows}
    assert list(seconds) == ["rollout", "score", "update", "eval", "checkpoint", "other"]
    assert seconds["rollout"] == pytest.approx(sum(r["time/rollout"] for r in records), abs=0.06)
    assert seconds["other"] == pytest.approx(0.08 * len(records), abs=0.06)
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=0.4)


def test_gate_curve_takes_the_presets_temperature_where_the_config_has_none(html):
    """A config may leave τ to its objective: the curve must still be drawn, with that τ."""
    assert {"A > 0, τ = 1", "A < 0, τ = 1.1"} <= {word.strip() for word in Page(html).words}


def test_every_k_of_pass_at_k_is_drawn(html):
    assert {"Pass@1", "Pass@8"} <= {word.strip() for word in Page(html).words}


def test_supervised_run_has_no_reward_ratios_or_samples(tmp_path):
    """The learner logs ratios to an old policy that demonstrations do not have: not shown."""
    make_run(tmp_path / "run", iterations=60, supervised=True)
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    panels = {"pass", "evaluations", "entropy", "gradient", "loss", "phases"}
    assert _present(html) == panels | {"learning", "policy", "time", "config"}
    head = html[: html.index("<nav>")]
    assert "Supervised training" in head
    assert "Loss" in head
    assert "SAPO" not in head
    assert "Reward" not in head


def test_one_iteration_is_drawn(tmp_path):
    """A run of one iteration has no line to draw, and its page must still show its numbers."""
    make_run(tmp_path / "run", iterations=1)
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    assert _present(html) == {*SECTIONS, *run_plots.PLOTS}
    assert "→" not in html[: html.index("<nav>")]


def test_nulls_are_left_out_and_told(tmp_path):
    """A collapse logs null: the plots go on around it, and the header says where it began."""
    records = make_run(tmp_path / "run", iterations=12)
    for record in records[6:]:
        record |= {"policy/loss": None, "grad/norm": None, "eval/pass_at_1_low": None}
        record["run/collapsed_at"] = 7
        record["histogram/gate_pos"] = None
        record["minibatch"] = [{"policy/ratio_max": None, "policy/ratio_min": None}, {}]
    for record in records:
        record |= {"policy/kl_old": None, "reward/mean": None}
        record["histogram/log_ratio_pos"] = {"edges": [0, 1], "counts": [0]}
        record["histogram/log_ratio_neg"] = {"edges": [0, None], "counts": [3]}
    _write_metrics(tmp_path / "run", records)
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    absent = {*SECTIONS, *run_plots.PLOTS} - _present(html)
    assert absent == {"kl", "reward", "log-ratio"}
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    head = " ".join(Page(html[html.index("<header>") : html.index("<nav>")]).words)
    assert "policy/loss (first in iteration 7)" in head
    assert "Collapsed at iteration 7, by the rule" in head
    assert "policy/kl_old (first in iteration 1)" in head


def test_empty_run_directory_gives_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    assert _present(html) == set()
    with pytest.raises(ValueError, match="nothing to draw"):
        report.picture(tmp_path / "run", tmp_path / "picture.png")


def test_closed_form_gate_is_drawn_for_sapo_only():
    records = [{"iteration": 1, "policy/ratio_min": 0.5, "policy/ratio_max": 2.0}]
    for name, drawn in (("sapo", True), ("grpo", False), ("p3o", False)):
        config = {"objective": {"name": name}}
        assert (style.figure_of(run_plots.PLOTS["gate"], records, config) is not None) == drawn


def test_ages_of_tokens_are_shares_and_shown_where_some_are_old():
    def record(*counts):
        edges = [i - 0.5 for i in range(len(counts) + 1)]
        return {"iteration": sum(counts), "histogram/age": {"edges": edges, "counts": counts}}

    whole = [record(1, 0, 0), {"iteration": 2}, record(1, 0, 2), record(0, 0, 0), record(1, 3, 0)]
    ax = _drawn_axes("ages", whole)
    tops = [patch.get_data().values.tolist() for patch in ax.patches]
    assert tops == [[1, 1 / 3, 1 / 4], [1, 1 / 3, 1], [1, 1, 1]]
    assert ax.get_legend_handles_labels()[1] == ["of the policy", "1 older", "2 older"]
    assert style.figure_of(run_plots.PLOTS["ages"], [record(5, 0, 0)], {}) is None
    assert style.figure_of(run_plots.PLOTS["ages"], [{"iteration": 1}], {}) is None


def _drawn_axes(slug, records):
    return style.figure_of(run_plots.PLOTS[slug], records, {}).axes[0]


def test_scales_are_readable_when_nothing_happens():
    """All rewards equal: ratios differ from 1 by rounding, gradients are 0, and plots say so."""
    minibatch = [{"policy/ratio_max": 1 + 1e-7, "policy/ratio_min": 1 - 1e-7}]
    still = {"iteration": 1, "grad/norm": 0.0, "eval/pass_at_1": 0.0, "advantage/zero_groups": 1.0}
    records = [{**still, "minibatch": minibatch}]
    low, high = _drawn_axes("extremes", records).get_ylim()
    assert 0.4 < low <= 0.5
    assert 2 <= high < 2.5
    low, high = _drawn_axes("gradient", records).get_ylim()
    assert low < 0 < high, "zeros need a linear axis"
    assert _drawn_axes("gradient", [*records, {"iteration": 2, "grad/norm": 1}]).get_ylim()[0] > 0
    assert -0.01 < _drawn_axes("pass", records).get_ylim()[0] <= 0
    assert 1 <= _drawn_axes("zero-groups", records).get_ylim()[1] < 1.01


def test_ratios_of_a_full_run_are_all_in_view(run):
    records = workdir.read_metrics(run)
    low, high = _drawn_axes("extremes", records).get_ylim()
    assert 0 < low < min(r["policy/ratio_min"] for r in records)
    assert max(r["policy/ratio_max"] for r in records) < high
    assert high / low < 1e5


def test_samples_are_new_mixed_and_marked(run, html):
    picked = report.pick_samples(workdir.read_samples(run))
    samples = [sample for chosen in picked for sample in chosen]
    assert len(samples) == report.SAMPLES
    assert {sample["iteration"] for sample in samples} == {200}
    assert len({sample["reward"] > 0.5 for sample in samples}) == 2
    assert len({sample["prompt_id"] for sample in samples}) == len(picked) == 8
    rights = sum(sample["reward"] > 0.5 for sample in samples)
    assert html.count("✓ right") == rights
    assert html.count("✗ wrong") == len(samples) - rights


def test_problems_that_were_solved_and_failed_come_first():
    """Side by side, a right and a wrong completion of one problem say what was learnt from."""

    def group(problem, *rewards):
        return [
            {"prompt_id": problem, "completion": f"{problem}.{i % 5}", "reward": reward}
            for i, reward in enumerate(rewards)
        ]

    solved = [s for i in range(40) for s in group(f"solved {i}", 1, 1)]
    failed = [s for i in range(5) for s in group(f"failed {i}", 0, None)]
    mixed = group("mixed 0", 0, 0, 0, 0, 1, 0, 0) + group("mixed 1", 1, 1, 0, 1, 1, 1)
    picked = report.pick_samples(solved + mixed + failed)
    names = [chosen[0]["prompt_id"] for chosen in picked]
    assert names[:2] == ["mixed 0", "mixed 1"]
    assert names[2:6] == ["solved 0", "failed 0", "solved 1", "failed 1"]
    assert sum(map(len, picked)) == report.SAMPLES
    assert [sample["reward"] for sample in picked[0]][:2] == [1, 0]
    few = report.pick_samples(mixed + group("solved", 1, 1, 1, 1, 1, 1, 1))
    assert [len(chosen) for chosen in few] == [5, 5, 5]  # of each text once


def test_problems_say_how_many_of_their_group_are_right():
    """Of runs of before only what was recorded is known; it was 2 of the 8, whatever they were."""
    old = [{"prompt_id": 1, "completion": f"{i}", "reward": float(i)} for i in range(2)]
    (problem,) = report._problems(old)
    assert (problem["right"], problem["count"]) == (1, "2 recorded completions")
    new = [{**s, "right": True, "group_right": 7, "group_size": 8} for s in old]
    (problem,) = report._problems(new)
    assert (problem["right"], problem["count"]) == (7, "8 completions")
    assert {sample["verdict"] for sample in problem["samples"]} == {"right"}


def test_a_mistake_of_the_page_is_no_fault_of_the_run(small, tmp_path, monkeypatch, capsys):
    """It has its traceback; only files that no run has written are blamed."""

    def fail(*_):
        raise KeyError("a mistake")

    monkeypatch.setattr(report, "_tiles", fail)
    monkeypatch.setattr("sys.argv", ["report", str(small)])
    with pytest.raises(SystemExit):
        cli.run(__main__.main, __main__.FLAGS)
    assert "Traceback" in capsys.readouterr().err
    make_run(tmp_path / "odd", iterations=2)
    part = tmp_path / "odd/metrics/part-00001.jsonl"
    part.write_text('{"iteration": 2, "grad/norm": "high"}\n')
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "odd")])
    with pytest.raises(SystemExit):
        cli.run(__main__.main, __main__.FLAGS)
    assert re.fullmatch(r"error: .* has grad/norm='high' .*\n", capsys.readouterr().err)


def test_long_curves_are_binned_and_keep_their_extremes(html):
    """A page of tens of megabytes stalls a browser; binning must not hide the one large ratio."""
    assert len(html) < 1.5e6
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[77_777] = 50
    few_x, few_y = run_plots._binned(x, y, np.max)
    assert len(few_x) == len(few_y) == run_plots.POINTS
    assert few_y.max() == 50
    assert few_x[few_y.argmax()] == pytest.approx(77_777, abs=100)


def test_picture_is_a_png_and_does_not_change(small, tmp_path):
    for name in ("a.png", "b.png"):
        report.picture(small, tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == (tmp_path / "b.png").read_bytes()


STARTS = [
    {
        "command": f"python -m sapo_jax.main --config={config}",
        "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
        "versions": {"sapo_jax": "9.8.7", "jax": "1.2.3", "python": "3.14.15"},
        "device": "TPU v99",
        "devices": 512,
        "started": f"2026-01-0{day}T00:00:00+00:00",
    }
    for day, config in ((1, "first.py"), (2, HOSTILE))
]


def test_page_says_what_made_the_run(tmp_path):
    """Command line, commit, versions, device of the last start; runs of before have none."""
    make_run(tmp_path / "run", iterations=2)
    assert 'class="origin"' not in report.write(tmp_path / "run").read_text(encoding="utf-8")
    (tmp_path / "run" / provenance.FILE).write_text(json.dumps(STARTS))
    html = report.write(tmp_path / "run").read_text(encoding="utf-8")
    assert "<script" not in html
    words = " ".join(" ".join(Page(html).words).split())
    for expected in ("--config=</script>", "0123456789ab, changed", "9.8.7", "1.2.3", "3.14.15"):
        assert expected in words
    assert "512 × TPU v99 · started 2026-01-02" in words
    assert "start 2; the first: 2026-01-01" in words


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere", "does not exist"), (".", "nothing to show in"), ("other.json", "no 'stages'")],
)
def test_nothing_to_show_is_one_line(path, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / path)])
    with pytest.raises(SystemExit):
        cli.run(__main__.main, __main__.FLAGS)
    line = capsys.readouterr().err
    assert said in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


def test_a_template_that_names_no_value_is_an_error(tmp_path):
    """A typo in a template must not leave a hole in the page."""
    with pytest.raises(jinja2.UndefinedError, match="'plots' is undefined"):
        page.write(tmp_path / "page.html", "sweep", name="x")
