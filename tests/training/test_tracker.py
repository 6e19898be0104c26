"""A tracker that fails costs its events and one warning; the loop and its metrics go on."""

import errno
import threading
import time

import pytest
from absl import logging

from sapo_jax import train
from sapo_jax.training import tracker
from sapo_jax.training.workdir import Metrics, read_metrics

writers = pytest.importorskip("tensorboardX.record_writer")
HISTOGRAM = {"edges": [0.0, 1.0], "counts": [3]}


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def hang(*_):
    threading.Event().wait()


FAULTS = {
    "no space to write": lambda m, _: m.setattr(writers.RecordWriter, "write", no_space),
    "no space to flush": lambda m, _: m.setattr(writers.RecordWriter, "flush", no_space),
    "no space to close": lambda m, _: m.setattr(writers.RecordWriter, "close", no_space),
    "no place": lambda _, workdir: (workdir / "tensorboard").write_text("a file"),
    "a write that hangs": lambda m, _: m.setattr(writers.RecordWriter, "write", hang),
    "a place that hangs": lambda m, _: m.setattr(writers, "directory_check", hang),
    "another version": lambda m, _: m.delattr(writers, "RecordWriter"),
    "a broken histogram": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracker_that_fails_is_dropped(fault, tmp_path, monkeypatch):
    """Guards against a writer thread that died of ENOSPC, behind which the loop waits for ever."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(tracker, "PATIENCE", 0.2)
    monkeypatch.setattr(tracker, "FLUSH", 0.0)
    monkeypatch.setattr(tracker, "ROOM", 20)
    if FAULTS[fault]:
        FAULTS[fault](monkeypatch, tmp_path)
    histogram = HISTOGRAM if FAULTS[fault] else HISTOGRAM | {"counts": [None]}
    count = 60

    def write():
        with Metrics(tmp_path, first_iteration=-1) as metrics:
            for iteration in range(count):
                metrics.write({"iteration": iteration, "histogram/ratio": histogram})

    loop = threading.Thread(target=write, daemon=True)
    loop.start()
    loop.join(30)
    assert not loop.is_alive()
    assert [record["iteration"] for record in read_metrics(tmp_path)] == list(range(count))
    assert len(warnings) == 1, warnings
    assert str(tmp_path / "tensorboard") in warnings[0]


def test_a_clock_that_goes_back_harms_nothing(tmp_path, monkeypatch):
    """Guards against `queue.get` with the negative time-out that a clock's jump leads to."""
    monkeypatch.setattr(logging, "warning", lambda *message: pytest.fail(str(message)))
    now = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    with Metrics(tmp_path, first_iteration=-1) as metrics:
        for iteration in range(30):
            metrics.write({"iteration": iteration, "reward/mean": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 30 * 40


def test_a_report_that_fails_takes_no_run_down(tmp_path, monkeypatch):
    """The iterations are done and saved: a full disk or a broken font is no reason to exit by 1."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr("sapo_jax.report.run.write", no_space)
    train.report(tmp_path)
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
