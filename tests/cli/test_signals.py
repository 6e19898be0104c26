"""SIGTERM and Ctrl-C: one line, the statuses 143 and 130, whatever the command does."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from sapo_jax import cli
from sapo_jax.cli.signals import Signals

ROOT = pathlib.Path(__file__).parents[2]
STATUS = {signal.SIGTERM: (143, "stopped by SIGTERM"), signal.SIGINT: (130, "stopped by Ctrl-C")}


@pytest.mark.parametrize("number", STATUS)
def test_a_command_ends_in_one_line(number, monkeypatch, capsys):
    """Guards against a traceback, and a status that a script takes for success."""
    flags = cli.Flags("list", "A command.")
    monkeypatch.setattr("sys.argv", ["list"])
    before = signal.getsignal(number)

    def main(_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        cli.run(main, flags)
    assert (ended.value.code, capsys.readouterr().err) == (
        STATUS[number][0],
        STATUS[number][1] + "\n",
    )
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", STATUS)
def test_a_command_that_computes_on_is_ended(number):
    """Guards against minutes in XLA, during which Python calls no handler."""
    code = f"""
        import hashlib, os, threading
        from sapo_jax.cli import signals
        with signals.Signals(patience=0.2):
            threading.Timer(0.3, os.kill, (os.getpid(), {int(number)})).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call, without the GIL
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (STATUS[number][0], f"\n{STATUS[number][1]}\n")


SWALLOWS = """
import os, time
try:
    os.kill(os.getpid(), {number})
    time.sleep(60)
except BaseException:  # as what a library calls back, whose exceptions Python only mentions
    time.sleep(60)
"""
STARTS = {
    "config": """
        from sapo_jax import cli
        given = cli.Flags("train", "")
        given.config_file()
        cli.run(print, given)
    """,
    "import": """
        from sapo_jax.cli import __main__ as console
        console.COMMANDS["train"] = ("own", "")
        console.main()
    """,
}


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("start", STARTS)
def test_a_command_that_starts_ends_in_one_line(start, number, tmp_path):
    """Guards against a traceback from an import, and against a signal that one swallows."""
    (tmp_path / "own.py").write_text(SWALLOWS.format(number=int(number)))
    command = [sys.executable, "-c", textwrap.dedent(STARTS[start]), "train", "--config=own.py"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True,
        text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (STATUS[number][0], f"\n{STATUS[number][1]}\n")


def test_signals_that_are_ignored_stay_so():
    """A shell starts background jobs with SIGINT ignored: Ctrl-C is for others."""
    before, found = signal.signal(signal.SIGINT, signal.SIG_IGN), []
    try:
        with Signals(found.append):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert found == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_inner_signals_come_first_and_outer_ones_again_behind_them():
    found = []
    with Signals(lambda number: found.append("outer"), lambda number: found.append("late"), 0.01):
        with Signals(found.append, lambda number: found.append("overdue"), 0.01):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    assert found == [signal.SIGTERM, "overdue", "outer", "late"]


def test_other_threads_have_no_signals():
    def elsewhere():
        with Signals():
            found.append(True)

    found = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [True]
