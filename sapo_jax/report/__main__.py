"""Pages again from what a command left: python -m sapo_jax.report PATH [--picture=FILE.png].

PATH is a run directory, a sweep's, or a result of the gradient lab (a JSON file).
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from etils import epath

from sapo_jax.report import gradlab, run, sweep

SWEEP = ("manifest.json", "report.json")
RUN = ("metrics", "config.json", "preflight.json")


def kind_of(path: epath.Path) -> ModuleType:
    """What tells the page of a path, by what lies there.

    Raises:
        ValueError: nothing that a page could show lies there.
    """
    if path.suffix == ".json" and path.exists():
        return gradlab
    for kind, names in ((sweep, SWEEP), (run, RUN)):
        if any((path / name).exists() for name in names):
            return kind
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    run_of, sweep_of = ("/ or ".join(names) for names in (RUN, SWEEP))
    raise ValueError(
        f"nothing to show in {path}: a run leaves {run_of} there, a sweep {sweep_of}, and the "
        "gradient lab a file of its own, such as quickstart_0.json"
    )


def main() -> None:
    """Write the page of PATH, or draw its picture."""
    parser = argparse.ArgumentParser(prog="python -m sapo_jax.report", description=__doc__)
    parser.add_argument("path", type=epath.Path)
    parser.add_argument("--picture", type=epath.Path, help="a PNG of the main panels instead")
    given = parser.parse_args()
    try:
        kind = kind_of(given.path)
        if given.picture:
            kind.picture(given.path, given.picture)
        print(given.picture or kind.write(given.path))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
