"""The tiny sweep as a process that kills itself in an update of a given number."""

import os
import signal
import sys

import jax

from sapo_jax.learner import step
from sapo_jax.sweep import cohorts, schedule
from tests import tiny_sweep


def main(workdir: str, number: int) -> None:
    """Run, and die in the update."""
    jax.config.update("jax_platforms", "cpu")
    update, calls = step.update, [0]

    def counted(*arguments, **options):
        out = update(*arguments, **options)
        calls[0] += 1
        if calls[0] == number:
            jax.block_until_ready(out)
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    step.update = counted
    parts = cohorts.make(tiny_sweep.get_config(), tiny_sweep.get_sweep(), most=3)
    schedule.run(parts, workdir)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
