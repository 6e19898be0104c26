"""The command line of sweeps: killed for real, it goes on; mistakes are one line."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sapo_jax import cli
from sapo_jax.training import workdir
from tests import tiny_sweep

COMMAND = [sys.executable, "-m", "sapo_jax.sweep", "--config=tests/tiny_sweep.py"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_sigkill_loses_and_repeats_no_run(tmp_path):
    """Killed in each cohort, then completed by the command: as the command without any kill."""
    killed = [sys.executable, "-m", "tests.sweep.killed_sweep", str(tmp_path / "killed")]
    for number in (17, 25):  # of 24 updates a cohort, after 2 for the warm-up
        done = subprocess.run([*killed, str(number)], env=ENVIRONMENT, check=False)
        assert done.returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        command = [*COMMAND, "--most=3", f"--workdir={tmp_path / name}"]
        done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1].startswith("report: ")
        assert (tmp_path / name / "report.html").stat().st_size > 10_000

    def records(name, run):
        found = workdir.read_metrics(tmp_path / name / run["directory"])
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found]

    listed = json.loads((tmp_path / "killed" / "manifest.json").read_text())["runs"]
    assert [run["overrides"] for run in listed] == tiny_sweep.get_sweep()
    for run in listed:
        assert records("killed", run) == records("whole", run)
        assert len(records("whole", run)) == 5


def test_a_config_without_a_sweep_is_refused():
    with pytest.raises(ValueError, match=r"must have a function get_sweep\(\)"):
        cli.from_config("configs/quickstart.py", "get_sweep")


@pytest.mark.parametrize("name", ["temperature", "algorithms"])
def test_the_sweeps_of_the_repository_resolve(name, monkeypatch):
    """One cohort each: everything that they vary is traced."""
    import importlib

    from sapo_jax.sweep import cohorts

    config = importlib.import_module(f"configs.sweeps.{name}")
    (cohort,) = cohorts.make(config.get_config(), config.get_sweep())
    assert len(cohort.runs) >= 24
