"""The gradient lab's page, from statistics made up here: every plot has its words and its data."""

import html
import json
import re

import jax
import numpy as np
import pytest

from sapo_jax.gradlab import tokens
from sapo_jax.report import gradlab
from sapo_jax.report.gradlab_plots import PLOTS
from tests.report.test_run import panels_of

NAMES = ["ungated", "ungated_token", "sapo", "gspo"]


def interval(rng):
    value = float(rng.normal(0.5, 0.2))
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def fidelities(rng, count):
    entries = [interval(rng) | {"difference": interval(rng)} for _ in range(count)]
    return {"reward": entries, "own": entries}


def stage(rng, updates):
    matrix = np.eye(len(NAMES)).tolist()
    parts = ("whole", "layer 0", "layer 1", "attention", "mlp", "embedding")
    nothing = {"value": None, "low": None, "high": None}
    removed = fidelities(rng, len(NAMES)) | {"mass": [0.0, 0.0, 0.01, 0.3]}
    removed["reward"][0] = nothing | {"difference": nothing}
    edges = tokens.GATE_EDGES
    counts = rng.integers(0, 50, len(edges) - 1).tolist()
    sides = {side: {"w": counts, "c": counts} for side in ("positive", "negative")}
    logits = {side: {"l1": 1.0, "l2": 2.0, "spread": 3.0} for side in sides}
    algorithm = {
        "histograms": sides, "ess": 0.9, "silenced": 0.1, "mass_off_policy": {"0.05": 0.2},
        "dropped_sequences": 0.4, "collateral": None, "logits": logits,
    }  # fmt: skip
    return {
        "updates": updates,
        "gradients": {
            "names": NAMES,
            "norm": {part: [1.0, 1.1, 0.9, 0.5] for part in parts},
            "cosine": dict.fromkeys(parts, matrix),
            "fidelity": fidelities(rng, len(NAMES)),
            "removed": removed,
            "noise_scale": [3.0, None, 4.0, 5.0],
            "target_halves": [0.8, 0.7, 0.7],
        },
        "tokens": {
            "tokens": 100,
            "abs_log_ratio": {"mean": 0.01, "max": 0.3},
            "sequences": tokens.gate_spread(rng.normal(0, 0.3, (9, 5)), np.ones((9, 5), bool), 1.0),
            "gate_edges": edges.tolist(),
            "algorithms": {"sapo": algorithm, "gspo": algorithm},
        },
    }


@pytest.fixture
def found(rng):
    stages = [stage(rng, 0), stage(rng, 3), stage(rng, 15)]
    names = [("sign", "A > 0"), ("log_ratio", "0 to 0.01"), ("probability", "1"), ("entropy", "1")]
    split = fidelities(rng, 4) | {"mass": [0.1] * 4}
    stages[-1]["groups"] = {"names": names, "carried": split, "removed": split}
    about = {"model": "tiny", "seed": 0, "iteration": 10, "trained_with": "sapo", "prompts": 32}
    about |= {"group_size": 8, "fresh": 128, "focus": "sapo", "learning_rate": 1e-4}
    return about | {"stages": stages}


def test_the_page_holds_every_plot(found, tmp_path):
    """Each plot with its title, what to look for, and at least one mark; nothing from elsewhere."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(found))
    page = gradlab.write(path)
    text = page.read_text()
    assert page == tmp_path / "mine.html"
    words = panels_of(text)
    assert set(words) == set(PLOTS)
    for slug, (title, drawings, caption) in words.items():
        assert html.unescape(title) == PLOTS[slug].title
        assert drawings == 1 + PLOTS[slug].wide
        assert len(caption) > 30
    assert text.count("<section") == 5
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "<script" not in text
    value = found["stages"][-1]["gradients"]["fidelity"]["reward"][2]["difference"]["value"]
    assert f"{value:+.3f}".replace("-", "−") in text
    assert gradlab.write(path).read_text() == text  # the same statistics, the same bytes


def nothing_measured(value):
    """The same statistics where every number that can be missing is."""
    if isinstance(value, dict):
        absent = dict.fromkeys(("value", "low", "high", "ess", "silenced", "collateral", "spread"))
        emptied = {key: nothing_measured(each) for key, each in value.items()}
        for key in ("cosine", "noise_scale", "target_halves", "mass"):
            if key in value:
                emptied[key] = jax.tree.map(lambda _: None, value[key])
        for kind in {"w", "c"} & value.keys():
            emptied[kind] = [0] * len(value[kind])
        if "norm" in value:  # a gradient of zeros has a length, and nothing else
            emptied["norm"] = jax.tree.map(lambda _: 0.0, value["norm"])
        return emptied | {key: None for key in absent if key in value}
    return [nothing_measured(each) for each in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_page_of_nothing_but_nulls(found, tmp_path, caplog):
    """A logarithmic scale of nulls raised; so did shares of nothing: every plot takes them."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(nothing_measured(found)))
    text = gradlab.write(path).read_text()
    assert 'id="noise"' not in text
    assert 'id="fidelity"' in text
    assert not caplog.records


def test_a_plot_that_fails_takes_only_itself_down(found, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ValueError("Data has no positive values")

    monkeypatch.setitem(PLOTS, "norms", PLOTS["norms"]._replace(draw=fail))
    (tmp_path / "mine.json").write_text(json.dumps(found))
    text = gradlab.write(tmp_path / "mine.json").read_text()
    assert 'id="norms"' not in text
    assert 'id="fidelity"' in text
    assert "Length of the gradient" in caplog.text


def test_the_picture_is_small(found, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(found))
    gradlab.picture(tmp_path / "mine.json", tmp_path / "mine.png")
    written = (tmp_path / "mine.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) < 300_000


def test_what_was_not_measured_is_left_out(found, tmp_path):
    """No token groups, no clipped sequences: no empty frames."""
    del found["stages"][-1]["groups"]
    for each in found["stages"]:
        del each["tokens"]["algorithms"]["gspo"]
    path = tmp_path / "less.json"
    path.write_text(json.dumps(found))
    text = gradlab.write(path).read_text()
    for slug in ("groups", "share", "collateral"):
        assert f'id="{slug}"' not in text
    assert 'id="fidelity"' in text
