"""What a person sees while it computes."""

import io
import sys

import pytest
from absl import logging

from sapo_jax.training.progress import Progress


class Terminal(io.StringIO):
    """Standard error, of a terminal or of a file."""

    def __init__(self, shown):
        super().__init__()
        self.isatty = lambda: shown


@pytest.mark.parametrize("shown", [True, False], ids=["terminal", "file"])
def test_what_is_logged_has_its_own_lines(shown, monkeypatch):
    """It stood behind the bar, in the same line."""
    err = Terminal(shown)
    monkeypatch.setattr(sys, "stderr", err)
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", err)
    with Progress(3, "tiny") as bar:
        bar.note("compiling: update")
        handler.stream.write("W: one thing\n")
        bar.step()
        handler.stream.write("W: another\n")
        bar.step(2)
    assert handler.stream is err
    written = err.getvalue()
    for line in ("W: one thing", "W: another"):
        before, after = written.split(line)
        assert before.endswith("\r" if shown else "\n")
        assert after.startswith("\n")
    assert "compiling: update" in written
    assert ("\r" in written) == shown
