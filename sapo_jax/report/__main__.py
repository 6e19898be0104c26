"""The page of a run, a sweep or a gradient lab again, from what it left."""

from __future__ import annotations

from etils import epath

from sapo_jax import cli

FLAGS = cli.Flags("report", __doc__)
FLAGS.string("path", "", "Directory of a run or a sweep, or a lab's JSON file.", positional=True)
FLAGS.string("picture", "", "A PNG of the main panels instead.")


def main(given: cli.Flags) -> None:
    """Write the page of the path, or draw its picture."""
    from sapo_jax.report import gradlab, run, sweep  # late: --help needs no plots

    path = epath.Path(given.path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such directory or file")
    sweeps = any((path / name).exists() for name in ("manifest.json", "report.json"))
    kind = gradlab if path.suffix == ".json" else sweep if sweeps else run
    if kind is run and not (path / "config.json").exists():
        raise ValueError(f"{path}: neither a run (config.json) nor a sweep (manifest.json)")
    if given.picture:
        kind.picture(path, epath.Path(given.picture).expanduser())
    print(given.picture or kind.write(path))


if __name__ == "__main__":
    cli.run(main, FLAGS)
