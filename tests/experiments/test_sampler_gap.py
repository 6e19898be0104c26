"""The gap of the sampler's log-probabilities: what is said of it is what was measured."""

import itertools
import json

import pytest

from experiments.sampler_gap import run
from sapo_jax.training.metrics import METRICS

RESULTS = sorted((run.HERE / "results").glob("*.json"))


def test_bins_hold_every_token_once(rng):
    gap, position = rng.uniform(size=300), rng.integers(1, 20, 300)
    rows = run.binned(gap, position)
    assert sum(row["tokens"] for row in rows) == 300
    assert max(row["max"] for row in rows) == gap.max()
    assert all(a["to"] < b["from"] for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_what_is_said_was_measured(path):
    """Pages said at most 1e-5 of all tokens; no bin of positions stands out, unlikely tokens do."""
    found = json.loads(path.read_text())
    assert METRICS["sampler/logp_gap_mean"].healthy.startswith("f32 ≤ 1e-5")
    assert METRICS["sampler/logp_gap_max"].healthy == "f32 ≤ 1e-4: of unlikely tokens"
    assert found["all"]["mean"] <= 1e-5
    assert 1e-5 < found["all"]["max"] <= 1e-4
    unlikely, *likelier = found["by_logp"]
    assert unlikely["max"] == found["all"]["max"]
    assert max(row["mean"] for row in likelier) < unlikely["mean"] / 2
    *early, last = found["by_position"]
    assert last["mean"] < 3 * max(row["mean"] for row in early)
