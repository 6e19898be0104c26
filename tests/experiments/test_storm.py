"""A storm can be stopped itself, and says what it saw."""

import json
import subprocess
import sys

import pytest

from experiments.storm import run

EVENTS = [
    {"subject": "one process", "what": "undisturbed", "seconds": 9.0, "ends": {"state": "a"}},
    {"subject": "one process", "what": "killed", "life": 0, "moment": 1.0, "before": 0, "now": 0},
    {"subject": "one process", "what": "killed", "life": 0, "moment": 7.0, "before": 0, "now": 5},
    {"subject": "one process", "what": "complete", "life": 0, "differ": []},
    {"subject": "a sweep", "what": "complete", "life": 0, "differ": ["state"]},
]


def test_events_survive_a_cut_line(tmp_path):
    lines = [json.dumps(event) + "\n" for event in EVENTS]
    (tmp_path / "storm.jsonl").write_text("".join(lines) + lines[0][:20])
    storm = run.Storm(tmp_path)
    assert storm.events == EVENTS
    storm.add("a sweep", what="killed", life=1, moment=2.0, before=3, now=3)
    assert len(run.Storm(tmp_path).events) == len(EVENTS) + 1
    assert storm.undisturbed("one process") == EVENTS[0]  # and is not run again
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in run.table(storm).split("\n")
    ]
    assert rows[2] == ["one process", "2", "1 of the starts", "1", "1"]
    assert rows[4] == ["a sweep", "1", "1 of the starts", "1", "0"]


def test_other_files_are_no_storm(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        run.Storm(tmp_path)


def test_several_are_killed_and_one_that_has_ended_is_not():
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(sleeps) for _ in range(2)]
    assert run.kill(processes, 0.1, 0.1)
    assert [process.returncode for process in processes] == [-9, -9]
    assert not run.kill(processes, 0.1, 0.1)
    assert run.wait(processes, 1) == [-9, -9]
