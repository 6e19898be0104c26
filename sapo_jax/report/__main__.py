"""Pages again from what a command left: python -m sapo_jax.report PATH [--picture=FILE.png].

PATH is a run directory, a sweep's, or a result of the gradient lab (a JSON file).
"""

from __future__ import annotations

import argparse

from etils import epath

from sapo_jax.report import gradlab, run, sweep


def main() -> None:
    """Write the page of PATH, or draw its picture."""
    parser = argparse.ArgumentParser(prog="python -m sapo_jax.report", description=__doc__)
    parser.add_argument("path", type=epath.Path)
    parser.add_argument("--picture", type=epath.Path, help="a PNG of the main panels instead")
    arguments = parser.parse_args()
    path = arguments.path
    sweeps = any((path / name).exists() for name in ("manifest.json", "report.json"))
    kind = gradlab if path.suffix == ".json" else sweep if sweeps else run
    if arguments.picture:
        kind.picture(path, arguments.picture)
    print(arguments.picture or kind.write(path))


if __name__ == "__main__":
    main()
