"""The watchdog ends what hangs, and nothing else; SIGTERM is a request (see test_train too)."""

import contextlib
import subprocess
import sys

import jax
import pytest

from sapo_jax.parallel import distributed

HANGS = """
import time
from sapo_jax.parallel.distributed import Watchdog
with Watchdog({timeout}, index=3) as dog:
    for i in range({beats}):
        dog.beat(f"phase 'score' of iteration {{i}}")
        time.sleep(0.4)
    if {beats} == 3:
        time.sleep(60)
time.sleep(2 * {timeout})  # outside the context it ends nothing
print("alive")
"""


def run(timeout, beats):
    command = [sys.executable, "-c", HANGS.format(timeout=timeout, beats=beats)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_a_process_without_a_beat_ends_with_a_message():
    """A verifier that never returns, or a collective that waits for the dead, lasts for ever."""
    done = run(timeout=2, beats=3)
    assert done.returncode == distributed.HUNG
    assert "process 3" in done.stderr
    assert "phase 'score' of iteration 2" in done.stderr
    assert "distributed.timeout=2" in done.stderr
    assert "same command" in done.stderr


@pytest.mark.slow
def test_a_process_that_beats_lives():
    done = run(timeout=2, beats=8)
    assert (done.returncode, done.stdout) == (0, "alive\n")
    done = run(timeout=0, beats=0)
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("host:1", 2, None), "--process missing"),
        ((None, None, 1), "--coordinator, --processes missing"),
        (("host:1", 2, 2), "--process=2: must be from 0"),
        (("host", 2, 0), "--coordinator='host': must be host:port"),
    ],
)
def test_incomplete_addresses_are_refused(given, words):
    """A process that starts alone would train by itself, in the directory of the others."""
    with pytest.raises(ValueError, match=words):
        distributed.start(*given)


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # in the batch script, outside of srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, joins, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **kw: calls.append((a, kw)))
    distributed.start(None, None, None, timeout=7)
    assert calls == [((), {"heartbeat_timeout_seconds": 12})] * joins


def test_a_context_that_process_0_cannot_enter_is_entered_by_none():
    with pytest.raises(ZeroDivisionError), distributed.only_first(fails()):
        pytest.fail("entered")


@contextlib.contextmanager
def fails():
    yield 1 / 0
