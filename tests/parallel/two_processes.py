"""One of the processes of a small run, with two devices of the CPU; see `test_processes`."""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from sapo_jax import cli, learner, rewards, train
from sapo_jax.masked import finish
from sapo_jax.parallel import distributed, sharding
from sapo_jax.report import page
from sapo_jax.training import parameters, settings
from sapo_jax.types import Batch
from tests import fakes, killed_run, tiny_config

DEVICES, AT = 2, 3  # devices of a process; the iteration in which things happen
SIGNALS = {
    "dies": (signal.SIGKILL, AT), "stops": (signal.SIGSTOP, AT), "is asked": (signal.SIGTERM, 4),
}  # fmt: skip

SEES = {  # a run with pictures, which changes its tower
    "tasks": {
        "shapes": {"name": "count_shapes", "share": 0.5, "options": {"size": 16, "cells": 2}},
        "text": {"name": "chain_sum", "share": 0.5, "options": {"terms": 2}},
    },
    "model.preset": "tiny_vl", "model.train_vision": True, "data.max_image_tokens": 4,
    "learner.eps": 1e-5,
}  # fmt: skip


def resolved(**fields):
    """Rewards by length, so that rows differ and there is something to learn."""
    config = tiny_config.get_config()
    own = {
        "iterations": 4, "checkpoint.every": 2, "eval.every": 4, "sampler.slots": 0,
        "model.num_hidden_layers": 1,
        "reward.overlong": 1.0, "reward.buffer": 6, "distributed.timeout": 600.0,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(own | fields)
    return settings.from_config(config)


def updated(checked):
    """Loss, metrics and gradient of one update on one batch, the same wherever it is computed."""
    rng = np.random.default_rng(0)
    shape = (checked.rows, checked.width + checked.max_new_tokens)
    index = np.arange(shape[1])
    batch = Batch(
        rng.integers(2, checked.model.vocab_size, shape).astype(np.int32),
        (index > 3) & (index < rng.integers(5, shape[1] + 1, (shape[0], 1))),
        np.ones(shape, np.int32),
        *rng.normal(-3, 0.3, (2, *shape)).astype(np.float32),
        rng.normal(size=shape[0]).astype(np.float32),
    )
    hp = checked.hp.replace(max_grad_norm=1e9)
    state = learner.init(parameters.random(checked), hp)
    state, terms = learner.update(state, sharding.place(batch, checked.mesh), hp)
    loss, metrics = finish(sharding.to_host(terms))
    numbers = {k: np.asarray(v) for k, v in metrics.items() if not k.startswith("histogram")}
    moments = sharding.to_host(state.opt_state[1].mu)
    named = jax.tree_util.tree_leaves_with_path(moments)
    gradient = {jax.tree_util.keystr(k): v / np.float32(1 - hp.static.b1) for k, v in named}
    return {"loss": np.asarray(loss), **numbers}, gradient


def _hang():
    """A verifier that never returns."""
    judge, wait = rewards.judge, rewards.Groups.wait
    waits = [0]

    def slow(*arguments):
        if waits[0] == AT:  # the warm-up waits once as well, before any row is judged
            time.sleep(600)
        return judge(*arguments)

    def count(self):
        waits[0] += 1
        return wait(self)

    rewards.judge, rewards.Groups.wait = slow, count


def _note_own(found):
    """Keep what this process has judged itself: lengths and rewards."""
    submit = rewards.Scorer.submit

    def noted(self, rows):
        futures = submit(self, rows)
        found.extend(zip((row.length for row in rows), futures, strict=True))
        return futures

    rewards.Scorer.submit = noted


def main_(workdir, port, index, what):
    """Run as process ``index`` of two; ``what`` happens to it."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    index, found = int(index), []
    page.plots = fakes.no_plots
    # A busy machine is slow to start; where a time-out is waited for, it is short all the same.
    timeout = 30.0 if what == "hangs" else 600.0
    distributed.start(f"127.0.0.1:{port}", 2, index, timeout=10)
    cli.use_cache(str(pathlib.Path(".cache/tests").resolve()))
    fields = json.loads(os.environ.get("SAPO_JAX_TEST_FIELDS", "{}"))
    fields |= {"mesh.data": 2, "mesh.fsdp": 2, "distributed.timeout": timeout}
    checked = resolved(**fields)
    if index == 1 and what in SIGNALS:
        number, at = SIGNALS[what]

        def fatal(rollout, *arguments, **options):
            if options["policy_step"] == at:
                os.kill(os.getpid(), number)
            return rollout(*arguments, **options)

        killed_run.around_rollouts(fatal)
    elif index == 1 and what == "hangs":
        _hang()
    elif what == "whole":
        _note_own(found)
    try:
        train.run(checked, workdir)
    except Exception as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), file=sys.stderr)
        distributed.end(1)
    if what == "whole":
        judged = [(length, future.result().parts["overlong"]) for length, future in found]
        pathlib.Path(workdir, f"own-{index}.json").write_text(json.dumps(judged))
        numbers, gradient = updated(checked)
        if index == 0:
            np.savez(pathlib.Path(workdir, "update.npz"), **numbers, **gradient)


if __name__ == "__main__":
    main_(*sys.argv[1:])
