"""A run directory says what made it, and every start of it adds an entry."""

import subprocess
import sys

import jax

from sapo_jax.training import provenance


def test_every_start_is_an_entry(tmp_path, monkeypatch):
    """A run that goes on elsewhere must not pass for one that was made there as a whole."""
    assert provenance.read(tmp_path) == []
    provenance.write(tmp_path)
    command = ["/usr/bin/python3", "-m", "sapo_jax.main", "--config=my configs/q.py"]
    monkeypatch.setattr(sys, "orig_argv", command)
    provenance.write(tmp_path)
    first, second = provenance.read(tmp_path)
    assert first["command"] != second["command"]
    assert second["command"] == "python3 -m sapo_jax.main '--config=my configs/q.py'"
    monkeypatch.setattr(
        sys, "orig_argv", ["/v/bin/python", "/v/bin/sapo-jax", "train", "--config=q"]
    )
    assert provenance.provenance()["command"] == "sapo-jax train --config=q"
    assert second["versions"]["jax"] == jax.__version__
    assert second["device"] == jax.devices()[0].device_kind
    assert second["devices"] == jax.device_count()


def test_commit_is_that_of_the_sources(tmp_path):
    """An installed package inside someone's repository must not show that repository's commit."""

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ("git", "-C", tmp_path, *who, *words), check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    git("init")
    assert provenance.commit(tmp_path) is None  # it has no commit yet
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "one")
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    assert provenance.commit(tmp_path / "inside") is None
