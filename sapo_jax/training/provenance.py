"""What a run was started with: command line, commit, versions, devices."""

from __future__ import annotations

import datetime
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
from etils import epath

import sapo_jax
from sapo_jax.training.files import read_json, write_json

ROOT = pathlib.Path(__file__).parents[2]
FILE = "provenance.json"


def commit(root: pathlib.Path = ROOT) -> str | None:
    """The commit of a checkout, with "-dirty" where files differ from it; None of other folders."""
    if not (root / ".git").exists():  # a folder inside another repository has that one's commit
        return None
    describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    command = ["git", "-C", str(root), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Command line, commit, versions, devices and time of this process."""
    devices, words = jax.devices(), sys.orig_argv
    if len(words) > 1 and pathlib.Path(words[1]).name == "sapo-jax":
        words = words[1:]  # an installed command, without the interpreter
    versions = {"sapo_jax": sapo_jax.__version__, "jax": jax.__version__}
    return {
        "command": shlex.join([pathlib.Path(words[0]).name, *words[1:]]),
        "commit": commit(),
        "versions": versions | {"python": platform.python_version()},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(workdir: epath.PathLike) -> None:
    """Add an entry of this start to a run directory's provenance.json."""
    write_json(epath.Path(workdir) / FILE, [*read(workdir), provenance()])


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """An entry for each start, oldest first; [] where none was written."""
    return read_json(epath.Path(workdir) / FILE, [dict]) or []
