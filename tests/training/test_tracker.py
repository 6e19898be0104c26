"""A tracker that fails costs its events and one warning; the loop and its metrics go on."""

import errno
import json
import struct
import sys
import threading
import time
import types

import pytest
from absl import logging

from sapo_jax import train
from sapo_jax.training import tracker, workdir
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


def sent(path):
    """What a file of an offline run holds: records in LevelDB's log format, behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if 2**15 - at % 2**15 < 7 or kind == 0:  # the rest of a block
            at += 2**15 - at % 2**15
            continue
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    """Offline, by the real package: two starts of a run are one of its runs, of another another.

    Two at a time, as in a sweep; numbers and histograms arrive, and the iterations with them.
    """
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracker, "PATIENCE", 60.0)
    monkeypatch.setattr(logging, "warning", lambda *message: pytest.fail(str(message)))
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        workdir.write_config(place, {"name": "tiny", "seed": 3})
    for first in (0, 2):
        open_ = {"first_iteration": first, "trackers": ["wandb"]}
        with Metrics(places[0], **open_) as one, Metrics(places[1], **open_) as two:
            for log in (one, two):
                for i in (first + 1, first + 2):
                    drawn = {"histogram/ratio": HISTOGRAM, "minibatch": [{"grad/norm": 1.0}]}
                    log.write({"iteration": i, "reward/mean": i / 4} | drawn)
        time.sleep(1)  # a directory of wandb has the second in its name
    ids = []
    for place in places:
        found, names = [], set()
        for path in sorted(place.glob("wandb/offline-run-*/run-*.wandb")):
            names.add(path.stem.removeprefix("run-"))
            for record in sent(path):
                if record.WhichOneof("record_type") == "history":
                    items = {i.key or "/".join(i.nested_key): i for i in record.history.item}
                    found.append({k: json.loads(i.value_json) for k, i in items.items()})
                if record.WhichOneof("record_type") == "run":
                    assert record.run.display_name == place.name
                    assert record.run.run_group == "tiny"
        assert [row["iteration"] for row in found] == [1, 2, 3, 4]
        assert [row["reward/mean"] for row in found] == [0.25, 0.5, 0.75, 1.0]
        assert found[0]["histogram/ratio/values"] == [3]
        assert "minibatch" not in found[0]
        assert names == {json.loads((place / "wandb.json").read_text())["id"]}
        ids += names
    assert len(set(ids)) == 2
    assert wandb.run is None


def test_without_wandb_or_an_account_the_run_goes_on(tmp_path, monkeypatch):
    """One warning, that says what is missing; TensorBoard has its events."""
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Metrics(tmp_path, first_iteration=-1, trackers=("tensorboard", "wandb")) as metrics:
        metrics.write({"iteration": 0})
    assert len(warnings) == 1
    assert 'pip install "sapo_jax[wandb]" brings it' in warnings[0]
    assert list((tmp_path / "tensorboard").iterdir())
    nobody = types.SimpleNamespace(
        setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")),
        login=lambda prompt: prompt,
    )
    monkeypatch.setitem(sys.modules, "wandb", nobody)
    with Metrics(tmp_path, first_iteration=-1, trackers=("wandb",)) as metrics:
        metrics.write({"iteration": 0})
    assert "nobody has logged in: `wandb login`, or WANDB_MODE=offline" in warnings[1]


def test_no_tracker_writes_nothing(tmp_path):
    with Metrics(tmp_path, first_iteration=-1, trackers=()) as metrics:
        metrics.write({"iteration": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics"]
    assert tracker.listed(("tensorboard,wandb", "wandb")) == ["tensorboard", "wandb"]


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
