"""Two processes of four devices each: one run, killed and resumed, and three ways to fail."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest

from sapo_jax import learner, train
from sapo_jax.parallel import distributed
from sapo_jax.training import checkpoint
from sapo_jax.training.workdir import read_metrics, read_samples
from tests.parallel import two_processes
from tests.sweep.eight_meshes import comparable
from tests.test_staleness import same, saved

ROOT = pathlib.Path(__file__).parents[2]


def begin(workdir, what, module="tests.parallel.two_processes"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ)
    command = [sys.executable, "-m", module, str(workdir), str(port)]
    options = {"cwd": ROOT, "env": environment, "text": True}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, str(i), what], **options, **pipes) for i in range(2)]


def both(workdir, what, *module):
    """Exit statuses and messages of the two."""
    processes = begin(workdir, what, *module)
    try:
        messages = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], messages


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    statuses, messages = both(workdir, "whole")
    assert statuses == [0, 0], messages
    return workdir


def stored(workdir):
    """Metrics but for the times, and samples."""
    records = [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in read_metrics(workdir)
    ]
    samples = [read_samples(workdir, i) for i in range(1, 5)]
    return records, samples


def restored(workdir):
    checked = two_processes.resolved()
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        state, meta = checkpoints.restore(checkpoints.latest(), learner.abstract(checked.hp))
    return state, meta


def fails(workdir, what):
    """A run of which one process fails: the other ends by itself, soon, and says where it was."""
    processes = begin(workdir, what)
    try:
        message = processes[0].communicate(timeout=300)[1]
        elapsed = time.monotonic()
        assert processes[0].returncode not in (0, -signal.SIGKILL), message[-2000:]
        assert "process 0" in message or "unhealthy" in message or "heartbeat" in message
        if what != "stops":
            assert processes[1].wait(timeout=60) != 0
        assert time.monotonic() - elapsed < 60
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], message


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_where_one_was_killed(whole, tmp_path):
    """Bit for bit: parameters, optimizer, data position, samples, every metric but times."""
    statuses, message = fails(tmp_path, "dies")
    assert statuses[1] == -signal.SIGKILL
    done = [record["iteration"] for record in read_metrics(tmp_path)]
    assert done == [0, 1, 2], message
    statuses, messages = both(tmp_path, "")
    assert statuses == [0, 0], messages
    assert stored(tmp_path) == stored(whole)
    (state, meta), (expected, meta_expected) = restored(tmp_path), restored(whole)
    assert meta == meta_expected
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_the_processes_judge_different_rows_and_agree_on_the_metrics(whole):
    """With equal lengths and rewards everywhere, a process that ignores the others goes unseen."""
    own = [json.loads((whole / f"own-{i}.json").read_text()) for i in range(2)]
    half = 16  # rows of each process, in an iteration and in an evaluation; the last is one
    judged = np.array([rows[-5 * half : -half] for rows in own]).reshape(2, 4, half, 2)
    length, reward = np.moveaxis(judged, -1, 0)
    assert (np.abs(length[0].mean(-1) - length[1].mean(-1)) > 1e-3).any()
    assert (np.abs(reward[0].mean(-1) - reward[1].mean(-1)) > 1e-3).any()
    for key, values in (("length/mean", length), ("reward/overlong", reward)):
        found = [r[key] for r in read_metrics(whole) if key in r]
        np.testing.assert_allclose(found, values.mean((0, 2)), rtol=1e-6, err_msg=key)


@pytest.mark.slow
def test_one_update_agrees_with_one_process(whole):
    """Sums over two processes are those of one, to 1e-6."""
    found = np.load(whole / "update.npz")
    numbers, gradient = two_processes.updated(two_processes.resolved())
    for key, value in numbers.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    scale = max(np.abs(g).max() for g in gradient.values())
    for key, value in gradient.items():
        np.testing.assert_allclose(found[key], value, atol=1e-6 * scale, err_msg=key)


def given(monkeypatch, **fields):
    monkeypatch.setenv("SAPO_JAX_TEST_FIELDS", json.dumps(fields))


@pytest.mark.slow
def test_a_huge_budget_of_two_processes_changes_nothing(whole, tmp_path, monkeypatch):
    given(monkeypatch, **{"sampler.budget": 2**30})
    statuses, messages = both(tmp_path, "")
    assert statuses == [0, 0], messages
    found, samples = stored(tmp_path)
    assert {record.pop("sampler/goes_on", 0) for record in found} == {0}
    assert (found, samples) == stored(whole)


@pytest.mark.slow
def test_partial_rollouts_of_two_processes_go_on_where_one_was_killed(tmp_path, monkeypatch):
    """Each process has the completions that go on of its own prompts, and what waits."""
    fields = {"sampler.budget": 32 * 4, "staleness": 1, "checkpoint.every": 1, "iterations": 5}
    given(monkeypatch, **fields)
    statuses, messages = both(tmp_path / "whole", "")
    assert statuses == [0, 0], messages
    fails(tmp_path / "run", "dies")
    statuses, messages = both(tmp_path / "run", "")
    assert statuses == [0, 0], messages
    assert stored(tmp_path / "run") == stored(tmp_path / "whole")
    checked = two_processes.resolved(**fields)
    same(saved(tmp_path / "run", checked), saved(tmp_path / "whole", checked))
    found = read_metrics(tmp_path / "run")[1:]
    assert sum(record["sampler/goes_on"] > 0 for record in found) > 2
    learnt = sum(round(8 * (1 - record["sampler/goes_on"])) for record in found)
    under_way = [place for place in saved(tmp_path / "run", checked)[1]["begun"] if place]
    (position,) = saved(tmp_path / "run", checked)[1]["position"].values()
    assert position["read"] == learnt + len(under_way)


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_a_run_that_sees_is_that_of_one_process(tmp_path, monkeypatch):
    """Pictures beside text: each process draws and shows its own, and the tower learns from all."""
    given(monkeypatch, **two_processes.SEES)
    statuses, messages = both(tmp_path / "two", "")
    assert statuses == [0, 0], messages
    train.run(two_processes.resolved(**two_processes.SEES), tmp_path / "one")
    (found, shown), (expected, wanted) = (stored(tmp_path / name) for name in ("two", "one"))
    assert shown == wanted
    assert any(row.get("images") for rows in shown for row in rows)
    for record in (*found, *expected):  # how rows and weights lie
        for key in ("sampler/rows_per_token", "sampler/weights_moved_bytes"):
            record.pop(key, None)
    assert found[-1]["grad/norm"] > 0
    found, expected = (list(map(comparable, each)) for each in (found, expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.slow
def test_all_processes_stop_where_one_is_asked_to(whole, tmp_path):
    """They agree on where, or some would wait for the others for ever; iteration 3 is saved."""
    statuses, messages = both(tmp_path, "is asked")
    assert statuses == [143, 143], messages
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert stored(tmp_path)[0] == stored(whole)[0][:4]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stops", "hangs"])
def test_a_process_that_fails_ends_the_other(tmp_path, what):
    """Of one that is suspended, or whose verifier never returns, the other hears (above: killed).

    It says where it was and what to do, within the time-out and what start-up takes.
    """
    statuses, message = fails(tmp_path, what)
    if what == "hangs":
        assert statuses[0] in (1, distributed.HUNG), message[-2000:]
        assert "same command" in message
