"""Train the runs of a sweep, or go on with it; runs that can share their programs train together.

The config file has ``get_config()``, what all runs start from, and ``get_sweep()``, what each run
changes (see sapo_jax.axes).
"""

from __future__ import annotations

import jax

from sapo_jax import cli, report
from sapo_jax.parallel import distributed
from sapo_jax.sweep import cohorts, schedule

FLAGS = cli.Flags("sweep", __doc__)
FLAGS.config_file()
FLAGS.reward_function()
FLAGS.string("workdir", None, "Directory of the sweep, local or gs://…", required=True)
FLAGS.strings("axis", [], "FIELD=VALUE,…: of the config's sweep only such runs; once or more.")
FLAGS.integer("most", 0, "Runs that train together, at most; 0: all that can.", 0)
FLAGS.integer("job_index", 0, "Which part of the sweep this process runs.", 0)
FLAGS.integer("job_count", 1, "Number of jobs that share the sweep.", 1)
FLAGS.cluster()


def main(given: cli.Flags) -> None:
    """Run the sweep of the command line, or go on with it."""
    if given.coordinator or any(size != 1 for size in given.config.mesh.values()):
        timeout = given.config.distributed.timeout
        distributed.start(given.coordinator, given.processes, given.process, timeout=timeout)
    index, count = given.job_index, given.job_count
    if index >= count:
        raise ValueError(f"--job_index={index}: must be below --job_count={count}")
    overrides = cli.from_config(given["config"].config_filename, "get_sweep", _no_sweep(given))
    overrides = cohorts.restrict(cohorts.listed(overrides), given.axis)
    parts = cohorts.make(given.config, overrides, most=given.most)
    if count > len(parts):
        raise ValueError(
            f"--job_count={count}: the sweep has {len(parts)} cohort(s) for them; "
            f"--most={-(-len(overrides) // count)} makes more of its {len(overrides)} runs"
        )
    cli.use_cache(given.config.compilation_cache)
    whole = schedule.run(parts, given.workdir, job=(index, count))
    if jax.process_index() > 0:
        return
    if whole:
        print(_report(given.workdir))
        if stopped := schedule.stopped(parts, given.workdir):
            raise RuntimeError(stopped)
    else:
        goes_on = "the same command goes on" if count == 1 else "each job goes on by itself"
        print(f"the sweep is not complete yet: {goes_on}")


def _no_sweep(given: cli.Flags) -> str:
    """What to do where the config has no sweep."""
    write = "it returns what each run changes, such as axes.axis('seed', 0, 1, 2)"
    only = f"; --axis={given.axis[0]} only chooses among these" if given.axis else ""
    return f"{write} (docs/sweeps.md){only}"


def _report(workdir: str) -> str:
    try:
        from sapo_jax.report import sweep

        return f"report: {sweep.write(workdir)}"
    except ImportError:
        return report.no_page(workdir)


if __name__ == "__main__":
    cli.run(main, FLAGS, failed=distributed.end)
