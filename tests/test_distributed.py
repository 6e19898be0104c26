"""The watchdog ends what hangs, and nothing else; SIGTERM is a request (see test_train too)."""

import os
import signal
import subprocess
import sys
import threading

from sapo_jax import distributed

HANGS = """
import time
from sapo_jax.distributed import Watchdog
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


def test_a_process_that_beats_lives():
    done = run(timeout=2, beats=8)
    assert (done.returncode, done.stdout) == (0, "alive\n")
    done = run(timeout=0, beats=0)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_sigterm_is_noted_inside_the_context_only():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.preemption() as preempted:
        assert not distributed.any_process(preempted.requested)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.any_process(preempted.requested)
    assert signal.getsignal(signal.SIGTERM) == before
    inside = []

    def elsewhere():
        with distributed.preemption() as other:
            inside.append(other.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [False]
