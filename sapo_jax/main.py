"""Train a policy, or go on with a run: the same command, as often as it takes.

The run directory holds metrics, samples, checkpoints and a report.
"""

from __future__ import annotations

import jax

from sapo_jax import cli, report, train
from sapo_jax.parallel import distributed
from sapo_jax.training import progress, settings, workdir

FLAGS = cli.Flags("train", __doc__)
FLAGS.config_file()
FLAGS.reward_function()
FLAGS.string("workdir", None, "Run directory, local or gs://…", required=True)
FLAGS.cluster()


def main(given: cli.Flags) -> None:
    """Run the experiment, or go on with it."""
    timeout = given.config.distributed.timeout
    distributed.start(given.coordinator, given.processes, given.process, timeout=timeout)
    checked = settings.from_config(given.config)
    cli.use_cache(given.config.compilation_cache)
    path = train.run(checked, given.workdir)
    if jax.process_index() > 0:
        return
    print(progress.reached(workdir.read_metrics(given.workdir)))
    print(f"report: {path}" if path.exists() else report.no_page(given.workdir))


if __name__ == "__main__":
    cli.run(main, FLAGS, failed=distributed.end)
