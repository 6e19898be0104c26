"""Command line of sweeps: ``python -m sapo_jax.sweep --config=configs/sweeps/x.py --workdir=DIR``.

The config file has ``get_config()``, the config that all runs start from, and ``get_sweep()``, what
each run changes (see `axes`). Runs that can share their executables train together.
"""

from __future__ import annotations

import importlib.util
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sapo_jax import main
from sapo_jax.axes import Overrides
from sapo_jax.sweep import cohorts, schedule


def read_sweep(path: str) -> Overrides:
    """What the runs of a config file change.

    Raises:
      ValueError: the file has no ``get_sweep``.
    """
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{path}: must have a function get_sweep(), see configs/sweeps")
    return module.get_sweep()


def run_main(argv: list[str]) -> None:
    """Run the sweep of the command line, or go on with it."""
    given = flags.FLAGS
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.<field>=<value>")
    try:
        if given.job_index >= given.job_count:
            raise ValueError(
                f"--job_index={given.job_index}: must be below --job_count={given.job_count}"
            )
        overrides = read_sweep(config_flags.get_config_filename(given["config"]))
        parts = cohorts.make(given.config, overrides, most=given.most)
        if given.job_count > len(parts):
            raise ValueError(
                f"--job_count={given.job_count}: the sweep has {len(parts)} cohort(s) for them; "
                f"--most={-(-len(overrides) // given.job_count)} makes more of its "
                f"{len(overrides)} runs"
            )
        main.use_cache(given.config.compilation_cache)
        whole = schedule.run(parts, given.workdir, job=(given.job_index, given.job_count))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) or given["verbosity"].present:
            raise
        sys.exit(f"error: {error}\n(--verbosity=0 shows where)")
    goes_on = "the same command goes on" if given.job_count == 1 else "each job goes on by itself"
    print(_report(given.workdir) if whole else f"the sweep is not complete yet: {goes_on}")


def _report(workdir: str) -> str:
    try:
        from sapo_jax.report import sweep

        return f"report: {sweep.write(workdir)}"
    except ImportError as error:
        logging.warning("No report: %s.", error)
        return f"no report here; elsewhere: python -m sapo_jax.report {workdir}"


if __name__ == "__main__":
    flags.DEFINE_integer("most", 0, "Runs that train together, at most; 0: all that can.", 0)
    flags.DEFINE_integer("job_index", 0, "Which part of the sweep this process runs.", 0)
    flags.DEFINE_integer("job_count", 1, "Number of processes that share the sweep.", 1)
    app.run(run_main, flags_parser=main.parse)
