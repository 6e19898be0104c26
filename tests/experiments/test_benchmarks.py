"""Contests: targets and tables from records, and contestants that exist and run."""

import json
import re

import numpy as np
import pytest

from experiments.benchmarks import loop, ours, run, table
from experiments.benchmarks.workload import SHAPES, Shape
from experiments.evidence.study import markdown

TINY = Shape(vocab=32, hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8, prompts=2,
             group=2, prompt=3, completion=5)  # fmt: skip


def record(contest, contestant, wall_s, **fields):
    common = {"contest": contest, "shape": "small", "contestant": contestant, "compile_s": 5.04}
    return common | {"wall_s": wall_s, "walls_s": [wall_s, wall_s + 0.5]} | fields


RECORDS = [
    record("update", "update", 1.5),
    record("update", "update_packed", 1.8, tokens_per_s=4096.4, flops=9e9),
    record("update", "torch", 2.0),
    record("update", "peak", 0.5, flops=1e10),
    record("generate", "generate", 1.0, tokens_per_s=500.0),
    record("generate", "transformers", 1.0, tokens_per_s=200.0),
    record("generate", "tunix", 1.0, tokens_per_s=250.0),
    record("generate", "peak", 0.5, flops=1e10),
]


def test_targets_are_ratios_that_are_met_or_not():
    """Of times at most, of rates at least; those of contests or peers that were not run are out."""
    assert table.targets(RECORDS).splitlines()[2:] == [
        "| update ÷ plain torch | 0.90 | ≤ 0.9 | yes |",
        "| the same, prompts shared | 0.75 | ≤ 0.75 | yes |",
        "| tokens/s ÷ transformers | 2.50 | ≥ 2.5 | yes |",
        "| tokens/s ÷ tunix | 2.00 | ≥ 2.5 | **no** |",
        "| compiling an update, s | 5.04 | ≤ 5 | **no** |",
    ]
    assert len(table.targets([]).splitlines()) == 2


def test_a_contest_is_measured_by_its_first_contestant_and_the_machine():
    first, _, *lines = table.of(RECORDS[:4]).splitlines()
    assert first == "**update** (shape `small`; matrix products here reach 20 GFLOP/s)"
    assert lines[2:] == [
        "| update | 1.500 | 1.50–2.00 | 1.00 |  |  | 5.0 |",
        "| update_packed | 1.800 | 1.80–2.30 | 1.20 | 4,096 | 25% | 5.0 |",
        "| torch | 2.000 | 2.00–2.50 | 1.33 |  |  | 5.0 |",
    ]


def test_targets_name_contestants_of_their_contest():
    for target in table.TARGETS:
        labels = {entry.label for entry in run.CONTESTS[target.contest][1]}
        assert {target.over, target.under or target.over} <= labels


def contestants(path):
    """The names of a peer's CONTESTANTS, without what it imports."""
    (found,) = re.findall(r"^CONTESTANTS = {(.*)}$", path.read_text(), re.MULTILINE)
    return re.findall(r'"(\w+)":', found)


def test_contestants_exist():
    """And a peer's environment is one that the Makefile makes."""
    makefile = (run.ROOT / "Makefile").read_text()
    for shape, entries in run.CONTESTS.values():
        assert shape in SHAPES
        for entry in entries:
            path = run.HERE / (entry.module.replace(".", "/") + ".py")
            known = contestants(path) if entry.peer else ours.CONTESTANTS
            assert entry.name in known
            assert (entry.label in table.PEERS) == bool(entry.peer)
            assert not entry.peer or f".cache/peers/{entry.peer}/ready" in makefile


def test_the_loop_is_measured_by_its_phases_and_its_past():
    def runs(*each):
        phases = dict.fromkeys(loop.PHASES, 0.0)
        return [
            {"wall_s": 100 * s, "iteration_s": s, "pass_at_1": {"0": 0.4, "100": last},
             "phases_s": phases | {"rollout": 0.5, "update": update}}
            for s, update, last in each
        ]  # fmt: skip

    found = {
        "quickstart": {"then": {"cold_s": 100.0, "runs": runs((4.0, 3.0, 0.9), (2.0, 1.5, 0.8))},
                       "now": {"cold_s": 60.0, "runs": runs((1.5, 1.0, 0.8), (1.5, 0.7, 0.7))}},
        "rows_per_token": 1.25, "compile_s": {"4": 10.0, "28": 15.0},
    }  # fmt: skip
    assert [line[1:] for line in loop.rows(found)] == [
        ("-0.050 ± 0.035", "within two standard errors", "yes"),
        ("0.53", "≤ 0.55", "yes"),  # (60 + 150) ÷ (100 + 300)
        ("0.50", "≤ 0.55", "yes"),
        ("1.12", "≤ 1.02", "**no**"),  # of 1 and 1.25
        ("0.10", "≤ 0.05", "**no**"),  # of 0 and 0.2
        ("1.25", "≤ 1.25", "yes"),
        ("1.50", "≤ 1.3", "**no**"),
    ]
    stored = json.loads((table.HERE / "results" / "loop.json").read_text())
    text = markdown(["what", "here", "aim", "met"], loop.rows(stored))
    assert f"<!-- loop -->\n\n{text}" in table.README.read_text()


def test_tables_follow_from_the_results():
    """Otherwise: python -m experiments.benchmarks.table."""
    out = table.HERE / "results"
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    texts = [table.targets(records), *map(table.of, table.contests(records).values())]
    assert (out / "table.md").read_text() == texts[0] + "\n" + "\n".join(texts[1:])
    assert f"<!-- targets -->\n\n{texts[0]}\n<!-- /targets -->" in table.README.read_text()


@pytest.mark.parametrize("name", ["products", "attention"])
def test_parts_of_an_update_run(name):
    """Products of packed rows: 6 operations a weight and token, pads included."""
    once, facts = ours.CONTESTANTS[name](TINY)
    assert once() == {}
    if name == "products":
        batch = ours.learnt(TINY, ours.workload.rollouts(TINY))[0]()
        assert facts == {"flops": 6 * TINY.matmul_parameters() * np.size(batch.tokens)}
