"""The page of a run, a sweep or a gradient lab again, from what it left."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from etils import epath

from sapo_jax import cli
from sapo_jax.training import provenance
from sapo_jax.training.checks import check_type
from sapo_jax.training.files import check_file, read_json
from sapo_jax.training.workdir import read_config, read_metrics

SWEEP = ("manifest.json", "report.json")
STARTS = ("command", "commit", "versions", "device", "devices", "started")
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


def _strange(path: epath.Path, kind: ModuleType, error: Exception) -> str:
    """What in the files of a path can have led to an error; "" where they are as we write them."""
    places = [path]
    if kind.__name__.endswith("sweep") and (path / "manifest.json").exists():
        places = [path / run["directory"] for run in read_json(path / "manifest.json")["runs"]]
    elif not kind.__name__.endswith("run"):
        return f"what lies there has another shape, {type(error).__name__}: {error}"
    base = cli.from_config("base")
    for place in places:
        try:
            for field, value in cli.flat(read_config(place) or {}, sections=True).items():
                check_type(base, field, value)
        except ValueError as wrong:
            return f"{place}/config.json: {wrong}"
        lost = [key for start in provenance.read(place) for key in STARTS if key not in start]
        if lost:
            return f"{place}/provenance.json has a start without {lost[0]!r}"
        for record in read_metrics(place):
            for key, value in record.items():
                if not _is_metric(key, value):
                    where = f"in {place}/metrics, iteration {record['iteration']}"
                    return f"{where} has {key}={value!r:.60}"
    try:
        if kind.__name__.endswith("run"):
            kind.preflight(path)
    except SHAPE as wrong:
        return f"{path}/preflight.json has another shape, {type(wrong).__name__}: {wrong}"
    return ""


def _is_metric(key: str, value: Any) -> bool:
    """Whether a run can have written a metric."""
    if key == "minibatch":
        return isinstance(value, list) and all(isinstance(one, dict) for one in value)
    return isinstance(value, dict if key.startswith("histogram/") else int | float | None)


def main(given: cli.Flags) -> None:
    """Write the page of the path, or draw its picture."""
    path = epath.Path(given.path).expanduser()
    kind = kind_of(path)
    if given.picture:
        check_file(given.picture, "--picture=", lambda content: content[:4] == b"\x89PNG", "a PNG")
    import jinja2

    try:
        if given.picture:
            kind.picture(path, epath.Path(given.picture).expanduser())
        print(given.picture or kind.write(path))
    except (*SHAPE, jinja2.UndefinedError) as error:
        if what := _strange(path, kind, error):
            text = f"{path} cannot be shown: {what} (--verbosity=0 shows where)"
            raise ValueError(text) from error
        raise  # a mistake of the page


if __name__ == "__main__":
    cli.run(main, FLAGS)
