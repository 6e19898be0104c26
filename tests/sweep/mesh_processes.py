"""One of two processes, of four devices each, of a sweep over a mesh; see `test_mesh`."""

import os
import pathlib
import signal
import sys

import jax

from sapo_jax import axes, cli
from sapo_jax.parallel import distributed
from sapo_jax.report import page
from sapo_jax.sweep import cohorts, schedule
from tests import fakes, killed_run, tiny_sweep

RUNS = axes.zip_(axes.axis("seed", 3, 4, 5), axes.axis("objective.tau_neg", 1.05, 2.0, 1.0))
FIELDS = {
    "iterations": 3, "eval.every": 3, "checkpoint.every": 1, "log.samples_every": 1,
    "model.num_hidden_layers": 1, "sampler.max_new_tokens": 16, "learner.eps": 1e-5,
    "distributed.timeout": 600.0,
}  # fmt: skip
AT = 3  # iteration in which process 1 is killed, of the first cohort


def main(workdir, port, index, what):
    """Run as process ``index`` of two; ``what`` happens to it."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    index, page.plots = int(index), fakes.no_plots
    distributed.start(f"127.0.0.1:{port}", 2, index, timeout=10)
    cli.use_cache(str(pathlib.Path(".cache/tests").resolve()))
    base = tiny_sweep.get_config(**FIELDS, **{"mesh.run": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    if index == 1 and what == "dies":

        def fatal(rollout, *arguments, **options):
            if options["policy_step"] == AT:
                os.kill(os.getpid(), signal.SIGKILL)
            return rollout(*arguments, **options)

        killed_run.around_rollouts(fatal)
    try:
        assert schedule.run(cohorts.make(base, RUNS), workdir)
    except Exception as error:
        print(f"error: {error!r}", file=sys.stderr)
        distributed.end(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
