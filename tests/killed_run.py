"""The tiny run, perhaps with other fields, as a process that kills itself at a given place."""

import hashlib
import json
import os
import signal
import sys
import time
from functools import partial

import jax

from sapo_jax import sampler, train
from sapo_jax.learner import step
from sapo_jax.training import checkpoint, settings, stopping
from tests import tiny_config


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def _hang():
    """Stay in C, where no handler of Python is called, and let other threads run."""
    _ask_to_stop()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def around_rollouts(function) -> None:
    """Call a function in the place of each rollout, with it and what it is given."""
    for name in ("rollout", "partial_rollout"):
        setattr(sampler, name, partial(function, getattr(sampler, name)))


def _rollout(whole, *arguments, place, at, **options):
    now = not options.get("warm_up") and options.get("domain", "train") == "train"
    now = now and options["policy_step"] == at
    if now and place == "endless":
        _ask_to_stop()
        while True:  # until it is left
            time.sleep(0.01)
            options["on_segment"]()
    result = whole(*arguments, **options)
    if now:
        (_die if place == "rollout" else _ask_to_stop)()
    return result


def _kill_at(place: str, iteration: int) -> None:
    """Patch the place so that it dies at the iteration, in the middle of its work."""
    if place in ("rollout", "sigterm", "endless"):
        around_rollouts(partial(_rollout, place=place, at=iteration))
    elif place in ("minibatch", "hangs"):
        if place == "hangs":
            stopping.SHORT, stopping.PATIENCE = 0.0, 0.5  # with a copy of what it started from
        update, calls = step.update, [-2]  # two calls belong to the warm-up

        def second(*arguments):
            out = update(*arguments)
            calls[0] += 1
            if calls[0] == 2 * iteration:
                jax.block_until_ready(out)
                _die() if place == "minibatch" else _hang()
            return out

        step.update = second
    elif place == "checkpoint":
        save = checkpoint.Checkpoints.save

        def begin(self, number, *arguments, **options):
            save(self, number, *arguments, **options)
            if number == iteration:
                _die()

        checkpoint.Checkpoints.save = begin


def main(workdir: str, stop_at: str) -> None:
    """Run, and die where told."""
    jax.config.update("jax_platforms", "cpu")
    if stop_at:
        place, iteration = stop_at.split()
        _kill_at(place, int(iteration))
    config = tiny_config.get_config()
    config.update_from_flattened_dict(json.loads(os.environ.get("SAPO_JAX_TEST_FIELDS", "{}")))
    train.run(settings.from_config(config), workdir)


if __name__ == "__main__":
    main(sys.argv[1], os.environ.get("SAPO_JAX_TEST_STOP_AT", ""))
