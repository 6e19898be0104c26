"""The page of a run, a sweep or a gradient lab again, from what it left."""

from __future__ import annotations

from types import ModuleType

from etils import epath

from sapo_jax import cli
from sapo_jax.training.files import check_file
from sapo_jax.training.workdir import read_config

SWEEP = ("manifest.json", "report.json")
RUN = ("metrics", "config.json", "preflight.json")
SHAPE = ArithmeticError, LookupError, TypeError, AttributeError  # of JSON that is no result

FLAGS = cli.Flags("report", __doc__)
FLAGS.string("path", "", "Directory of a run or a sweep, or a lab's JSON file.", positional=True)
FLAGS.string("picture", "", "A PNG of the main panels instead.")


def kind_of(path: epath.Path) -> ModuleType:
    """What tells the page of a path, by what lies there.

    Raises:
        ValueError: nothing that a page could show lies there.
    """
    from sapo_jax.report import gradlab, run, sweep  # here: --help works without plots

    if path.suffix == ".json" and path.exists():
        return gradlab
    for kind, names in ((sweep, SWEEP), (run, RUN)):
        if any((path / name).exists() for name in names):
            if kind is run and "model_type" in (read_config(path) or {}):
                raise ValueError(f"{path} is a model directory, and of no run")
            return kind
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    run_of, sweep_of = (" or ".join(names) for names in (RUN, SWEEP))
    raise ValueError(
        f"nothing to show in {path}: a run leaves {run_of} there, a sweep {sweep_of}, and the "
        "gradient lab a file of its own, such as quickstart_0.json"
    )


def main(given: cli.Flags) -> None:
    """Write the page of the path, or draw its picture."""
    path = epath.Path(given.path).expanduser()
    kind = kind_of(path)
    if given.picture:
        check_file(given.picture, "--picture=", lambda content: content[:4] == b"\x89PNG", "a PNG")
    import jinja2  # here: --help works without plots

    try:
        if given.picture:
            kind.picture(path, epath.Path(given.picture).expanduser())
        print(given.picture or kind.write(path))
    except (*SHAPE, jinja2.UndefinedError) as error:
        what = f"what lies there has another shape, {type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be shown: {what} (--verbosity=0 shows where)") from error


if __name__ == "__main__":
    cli.run(main, FLAGS)
