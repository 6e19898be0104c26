"""A run directory has one owner, and its files are whole and consistent after any kill."""

import json
import math
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from sapo_jax.training import files, lease, workdir
from sapo_jax.training.lease import Lease
from sapo_jax.training.workdir import Metrics, read_metrics

ROOT = pathlib.Path(workdir.__file__).parents[2]


def start(script, *arguments):
    """Run Python code in another process, which prints a line when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()


HOLDER = """
    import os, sys, time
    from sapo_jax.training.lease import Lease

    with Lease(sys.argv[1]):
        if os.fork() == 0:
            print(os.getpid(), flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    """Guards against two runs that write the same checkpoints, against a SIGKILLed run that blocks
    its restart, and against a forked worker that holds the lock of its dead parent."""
    process, child = start(HOLDER, tmp_path)
    try:
        refusal = rf"{tmp_path} is in use by process {process.pid} on host .*another --workdir"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=refusal):
                Lease(tmp_path).__enter__()
        kill(process)
        os.kill(int(child), 0)  # the worker outlives its parent
        with Lease(tmp_path):
            assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    finally:
        os.kill(int(child), signal.SIGKILL)
        kill(process)


def test_a_lease_is_exclusive_within_a_process_and_free_after_it(tmp_path):
    """Guards against a lock that two threads of one process share, and against leftovers."""
    for _ in range(2):
        with Lease(tmp_path / "run"):
            with pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
                Lease(tmp_path / "run").__enter__()
            assert (tmp_path / "run" / "lease.json").exists()
        assert not (tmp_path / "run" / "lease.json").exists()


def test_the_heartbeat_is_refreshed(tmp_path, monkeypatch):
    """Guards against a lease that looks dead on an object store while its run is alive."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    with Lease(tmp_path):
        first = json.loads((tmp_path / "lease.json").read_text())
        deadline = time.time() + 10
        while (now := json.loads((tmp_path / "lease.json").read_text())) == first:
            assert time.time() < deadline
    assert now["heartbeat"] > first["heartbeat"]
    assert {**now, "heartbeat": 0} == {**first, "heartbeat": 0}


def test_remote_leases_go_by_the_heartbeat(tmp_path, monkeypatch):
    """Guards against two owners of a gs:// directory, where there are no locks."""
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    other = {"host": "tpu-7", "pid": 12, "token": "x", "heartbeat": time.time() - 50}
    (tmp_path / "lease.json").write_text(json.dumps(other))
    with pytest.raises(RuntimeError, match=r"process 12 on host tpu-7"):
        Lease(tmp_path).__enter__()
    (tmp_path / "lease.json").write_text(json.dumps(other | {"heartbeat": time.time() - 70}))
    with Lease(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


BROKEN = {"cut": "{", "list": "[]", "text": '{"heartbeat": "soon"}', "nothing": "{}"}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_lease_is_named_or_replaced(text, tmp_path, monkeypatch):
    """On a local disk the lock decides; where there is none, nobody knows who works there."""
    (tmp_path / "lease.json").write_text(text)
    with Lease(tmp_path):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
        (tmp_path / "lease.json").write_text(text)
        with pytest.raises(RuntimeError, match="in use by process unknown on host unknown"):
            Lease(tmp_path).__enter__()
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    with pytest.raises(ValueError, match=r"lease.json: (is|has|heartbeat) "):
        Lease(tmp_path).__enter__()


@pytest.mark.parametrize("path", ["metrics", "samples", "checkpoints", "tensorboard"])
def test_a_file_where_a_run_has_a_directory_is_refused(path, tmp_path):
    """Guards against a run that computes, and fails at its first sample or checkpoint."""
    workdir.write_config(tmp_path, {"iterations": 1, "learner": {}, "sampler": {}})
    workdir.check_workdir(tmp_path)
    (tmp_path / path).write_text("")
    with pytest.raises(ValueError, match=rf"{tmp_path}/{path}: is a file; must be a directory"):
        workdir.check_workdir(tmp_path)


@pytest.mark.parametrize(
    "path", [*workdir.FILES[1:], "metrics/part-00000.jsonl", "samples/iteration-000001.jsonl"]
)
def test_a_directory_where_a_run_has_a_file_is_refused(path, tmp_path):
    workdir.write_config(tmp_path, {"iterations": 1, "learner": {}, "sampler": {}})
    (tmp_path / path).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{path}: is a directory; must be a file"):
        workdir.check_workdir(tmp_path)


def test_a_file_in_place_of_a_checkpoint_is_refused(tmp_path):
    workdir.write_config(tmp_path, {"iterations": 1, "learner": {}, "sampler": {}})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "3").touch()
    with pytest.raises(ValueError, match=r"checkpoints/3: is a file; must be a directory"):
        workdir.check_workdir(tmp_path)


def test_a_run_that_lost_its_lease_stops(tmp_path, monkeypatch):
    """Guards against a suspended run that wakes up and writes beside its successor."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def be_robbed():
        with Lease(tmp_path):
            for _ in range(200):  # a beat may have been about to replace the file
                (tmp_path / "lease.json").write_text(json.dumps({"token": "another"}))
                time.sleep(0.05)

    try:
        with pytest.raises(KeyboardInterrupt):
            be_robbed()
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "lease.json").read_text()) == {"token": "another"}


def test_a_run_in_the_background_that_lost_its_lease_stops(tmp_path):
    """Scripts start background jobs with SIGINT ignored: an interrupt of itself changes nothing."""
    code = f"""
        import pathlib, signal, time
        from sapo_jax.training import lease
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        lease.HEARTBEAT_SECONDS = 0.01
        with lease.Lease({str(tmp_path)!r}):
            for _ in range(200):
                pathlib.Path({str(tmp_path)!r}, "lease.json").write_text('{{"token": "another"}}')
                time.sleep(0.05)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "another process took" in done.stderr


def test_what_fails_since_the_directory_is_deleted_says_so(tmp_path):
    told = pytest.raises(RuntimeError, match="was deleted while a run worked there")
    with told, Lease(tmp_path):
        (tmp_path / ".lock").unlink()
        raise ValueError("no metadata found")


@pytest.mark.slow
def test_a_run_whose_directory_is_deleted_stops(tmp_path, monkeypatch):
    """Guards against hours in a directory that has no config, and that another may start in."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    held = Lease(tmp_path / "run")

    def be_deleted():
        with held:
            held.check()
            (tmp_path / "run" / ".lock").unlink()  # with all else; a beat would race with rmtree
            time.sleep(10)

    try:
        with pytest.raises(KeyboardInterrupt):
            be_deleted()
        with pytest.raises(
            RuntimeError, match="was deleted while a run worked there: nothing more"
        ):
            held.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_config_is_stored_sorted_and_whole(tmp_path, monkeypatch):
    """Guards against a config.json that is half written when a start is killed."""
    assert workdir.read_config(tmp_path / "new") is None
    config = {"seed": 0, "objective": {"tau": 1.05, "dual_clip": math.inf}, "axes": (1, 2)}
    workdir.write_config(tmp_path / "new", config)
    assert workdir.read_config(tmp_path / "new") == config | {"axes": [1, 2]}
    text = (tmp_path / "new" / "config.json").read_text()
    assert text.index("axes") < text.index("objective") < text.index("seed")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(type(workdir.epath.Path(tmp_path)), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        workdir.write_config(tmp_path / "new", {"seed": 1})
    assert (tmp_path / "new" / "config.json").read_text() == text


def test_a_changed_config_is_refused_key_by_key(tmp_path):
    """Guards against a resumed run that silently trains with other hyperparameters."""
    config = {"seed": 0, "steps": 10, "objective": {"name": "sapo", "tau": 1.05}, "axes": (1, 2)}
    workdir.check_config(tmp_path, config, may_differ=frozenset())
    workdir.write_config(tmp_path, config)
    workdir.check_config(tmp_path, config, may_differ=frozenset())
    workdir.check_config(tmp_path, config | {"steps": 20}, may_differ=frozenset({"steps"}))
    changed = {"seed": 1, "steps": 20, "objective": {"name": "sapo", "eps": 0.2}, "axes": [1, 2]}
    with pytest.raises(ValueError, match="another --workdir, or restore") as caught:
        workdir.check_config(tmp_path, changed, may_differ=frozenset({"steps"}))
    assert str(tmp_path) in str(caught.value)
    _, *listed, _ = re.split("config: |; ", str(caught.value))
    assert listed == [
        "objective.eps: stored '(absent)', given 0.2",
        "objective.tau: stored 1.05, given '(absent)'",
        "seed: stored 0, given 1",
    ]
    assert "\n" not in str(caught.value)


def record(iteration):
    return {"iteration": iteration, "reward/mean": iteration / 7, "length/mean": [iteration, 1]}


def write_records(workdir, first, last):
    metrics = Metrics(workdir, first_iteration=first)
    for iteration in range(first + 1, last + 1):
        metrics.write(record(iteration))
    metrics.close()


@pytest.fixture
def no_tensorboard(monkeypatch):
    silent = types.SimpleNamespace(write=lambda record: None, close=lambda: None)
    monkeypatch.setattr(workdir, "Tracker", lambda *_: silent)


def test_records_are_json_and_exact(tmp_path, no_tensorboard):
    """Guards against NaN, which is not JSON, and against rounding that hides a resume's drift."""
    metrics = Metrics(tmp_path, first_iteration=0)
    third = np.float32(1) / np.float32(3)
    metrics.write(
        {
            "iteration": np.int32(1),
            "grad/norm": jnp.float32(third),
            "policy/entropy": jnp.bfloat16(0.1),
            "policy/ratio_max": float("inf"),
            "histogram/ratio": {"edges": jnp.array([0.0, 1, 2]), "counts": np.array([3, np.nan])},
        }
    )
    text = (tmp_path / "metrics" / "part-00000.jsonl").read_text()
    assert text.endswith("\n")
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert row["grad/norm"] == float(third)
    assert row["policy/entropy"] == float(jnp.bfloat16(0.1))
    assert row["policy/ratio_max"] is None
    assert row["histogram/ratio"] == {"edges": [0, 1, 2], "counts": [3, None]}
    assert read_metrics(tmp_path) == [row]
    for bad in ({"reward/mean": 1.0}, {"iteration": 1.5}, {"iteration": True}):
        with pytest.raises(ValueError, match="needs an integer 'iteration'"):
            metrics.write(bad)


@pytest.mark.parametrize("restored", [-1, 0, 99, 100, 101, 230, 250])
def test_metrics_are_cut_at_the_restored_iteration(tmp_path, no_tensorboard, restored):
    """Guards against iterations that are recorded twice, or lost, when a run is resumed from a
    checkpoint older than its last record."""
    write_records(tmp_path, -1, 150)
    write_records(tmp_path, 150, 250)
    write_records(tmp_path, restored, 260)
    assert read_metrics(tmp_path) == [record(i) for i in range(261)]
    parts = sorted((tmp_path / "metrics").iterdir())
    assert [p.name for p in parts] == [f"part-{i:05d}.jsonl" for i in range(len(parts))]
    assert max(len(p.read_text().splitlines()) for p in parts) == 100


def test_parts_are_read_by_number(tmp_path):
    """Guards against part 100000 sorting before part 99999, and against reading leftovers."""
    (tmp_path / "metrics").mkdir()
    for part in (100000, 99999, 3):
        (tmp_path / "metrics" / f"part-{part:05d}.jsonl").write_text(f'{{"iteration": {part}}}\n')
    (tmp_path / "metrics" / "part-00004.jsonl.tmp").write_text('{"iter')
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [3, 99999, 100000]
    assert read_metrics(tmp_path / "none") == []


WRITER = """
    import sys
    from sapo_jax.training import workdir

    metrics = workdir.Metrics(sys.argv[1], first_iteration=int(sys.argv[2]), trackers=())
    for iteration in range(int(sys.argv[2]) + 1, 100_000):
        metrics.write({"iteration": iteration, "noise": [iteration] * 300})
        if iteration == int(sys.argv[2]) + 2:
            print("ready", flush=True)
"""


def test_a_kill_at_any_point_leaves_whole_lines(tmp_path):
    """Guards against a part that is rewritten in place, of which a kill leaves a torn line or none
    of the earlier records."""
    last = 0
    for delay in (0.0, 0.05, 0.3):
        process, _ = start(WRITER, tmp_path, last)
        time.sleep(delay)
        kill(process)
        iterations = [r["iteration"] for r in read_metrics(tmp_path)]
        assert iterations == list(range(1, len(iterations) + 1))
        assert len(iterations) >= last + 2
        for path in (tmp_path / "metrics").glob("*.jsonl"):
            assert path.read_bytes().endswith(b"\n")
        last = len(iterations)


def test_only_a_cut_last_line_is_forgiven(tmp_path, no_tensorboard):
    """Guards against a reader that skips what it cannot read, or that a partial copy blocks."""
    write_records(tmp_path, 0, 102)
    first, last = sorted((tmp_path / "metrics").iterdir())
    with open(last, "ab") as file:
        file.write(b'{"iteration": 103, "rew\xc3')
    assert read_metrics(tmp_path) == [record(i) for i in range(1, 103)]
    write_records(tmp_path, 102, 103)
    assert read_metrics(tmp_path) == [record(i) for i in range(1, 104)]

    good = first.read_bytes()
    lines = good.split(b"\n")
    for broken in (b"", b"7", b'{"iteration": 2, "rew', b"\xff"):
        first.write_bytes(b"\n".join([lines[0], broken, *lines[2:]]))
        for read in (read_metrics, lambda path: Metrics(path, first_iteration=9)):
            with pytest.raises(ValueError, match=rf"{first}, line 2: .*repair"):
                read(tmp_path)
    first.write_bytes(good[:-5])
    with pytest.raises(ValueError, match=rf"{first}, line 100: "):
        read_metrics(tmp_path)
    first.write_bytes(good)
    last = max((tmp_path / "metrics").iterdir())
    last.write_bytes(b'{"iter\n' + last.read_bytes())
    with pytest.raises(ValueError, match=rf"{last}, line 1: "):
        read_metrics(tmp_path)


def test_gaps_are_named():
    """Guards against a report of what remains that passes for the whole."""
    assert workdir.gaps([record(i) for i in (0, 1, 4, 6)], 0, 9) == "2 to 3, 5, 7 to 9"
    assert workdir.gaps([record(i) for i in range(10)], 0, 9) == ""
    assert workdir.gaps([], 1, 2) == "1 to 2"


def test_records_are_on_the_disk_before_they_have_their_name(tmp_path, no_tensorboard, monkeypatch):
    """Guards against a loss of power after which a file has its name and nothing in it."""
    synced, fsync, replace = [], os.fsync, os.replace

    def noted(file):
        synced.append(os.path.realpath(f"/proc/self/fd/{file}"))
        fsync(file)

    def checked(old, new):
        assert os.path.realpath(old) in synced
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    write_records(tmp_path, 0, 1)
    assert synced[-2:] == [
        str(tmp_path / "metrics/part-00000.jsonl.tmp"),
        str(tmp_path / "metrics"),
    ]


def test_samples_come_back_and_are_cut(tmp_path):
    """Guards against samples of iterations that a resumed run has not reached yet."""
    assert workdir.read_samples(tmp_path) == []
    for iteration in (2, 10, 1_000_000):
        workdir.write_samples(tmp_path, iteration, [{"text": "é\u2028\n", "reward": np.float32(1)}])
    workdir.write_samples(tmp_path, 10, [{"text": f"{i}", "tokens": np.arange(2)} for i in (0, 1)])
    assert (tmp_path / "samples" / "iteration-000010.jsonl").exists()
    expected = [{"text": "0", "tokens": [0, 1]}, {"text": "1", "tokens": [0, 1]}]
    assert workdir.read_samples(tmp_path, 10) == expected
    assert workdir.read_samples(tmp_path) == [{"text": "é\u2028\n", "reward": 1.0}]
    assert workdir.read_samples(tmp_path, 3) == []
    workdir.cut_samples(tmp_path, 10)
    assert workdir.read_samples(tmp_path) == expected
    workdir.cut_samples(tmp_path, 9)
    assert workdir.read_samples(tmp_path) == workdir.read_samples(tmp_path, 2) != []


def test_half_written_files_of_a_killed_run_go(tmp_path):
    """Guards against .tmp files that stay for ever, and against the removal of other files."""
    half = ["config.json.tmp", "metrics/part-00003.jsonl.tmp", "samples/iteration-000004.jsonl.tmp"]
    whole = ["lease.json.tmp", "metrics/part-00003.jsonl", "checkpoints/x.tmp"]
    for name in half + whole:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    workdir.remove_temporary(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == sorted(whole)


def read_events(directory):
    """(step, tag, value) of every event, and the steps at which a restart purges."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    values, purges = [], []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            values += [(event.step, v.tag, v) for v in event.summary.value]
            if event.session_log.status == SessionLog.START:
                purges.append(event.step)
    return values, purges


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    """Guards against events without their step, and against a resumed run that TensorBoard draws
    twice because nothing purges the first."""
    pytest.importorskip("tensorboardX")
    histogram = {"edges": [0.0, 1.0, 3.0], "counts": [3, 1]}
    for first in (0, 1):
        metrics = Metrics(tmp_path, first_iteration=first)
        metrics.write(record(first + 1) | {"histogram/ratio": histogram, "grad/norm": math.nan})
        metrics.close()
    values, purges = read_events(tmp_path / "tensorboard")
    assert purges == [1, 2]
    assert {tag for _, tag, _ in values} == {"iteration", "reward/mean", "histogram/ratio"}
    scalars = [(step, v.simple_value) for step, tag, v in values if tag == "reward/mean"]
    assert scalars == [(i, pytest.approx(i / 7)) for i in (1, 2)]
    histo = next(v.histo for _, tag, v in values if tag == "histogram/ratio")
    assert (histo.min, histo.max, histo.num) == (0, 3, 4)
    assert (histo.sum, histo.sum_squares) == (3 * 0.5 + 2, 3 * 0.25 + 4)
    assert (list(histo.bucket_limit), list(histo.bucket)) == ([1, 3], [3, 1])


def test_metrics_work_without_tensorboard(tmp_path, monkeypatch):
    """Guards against a bare image on which the optional writer stops the run."""
    warnings = []
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(logging, "warning", lambda *message: warnings.append(message))
    write_records(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == [record(i) for i in (1, 2, 3)]
    assert len(warnings) == 1


@pytest.mark.parametrize("damage", [{"iterations": "x"}, {"checkpoint": {"every": None}}])
def test_a_damaged_field_that_may_differ_is_no_other_value(damage, tmp_path):
    """The next start would write over it, and nobody would know."""
    config = {"iterations": 3, "checkpoint": {"every": 2}}
    may_differ = frozenset({"iterations", "checkpoint.every", "gone.field"})
    workdir.write_config(tmp_path, config | {"gone": {"field": 3}})
    workdir.check_config(tmp_path, config | {"iterations": 4}, may_differ=may_differ)
    workdir.write_config(tmp_path, config | damage)
    wrong = r"config.json: config\.(iterations='x'|checkpoint.every=None): must be a whole number"
    with pytest.raises(ValueError, match=wrong):
        workdir.check_config(tmp_path, config, may_differ=may_differ)


def test_a_byte_order_mark_in_an_edited_config_is_passed_over(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 3}')
    assert workdir.read_config(tmp_path) == {"seed": 3}
