"""Weights & Biases: a run directory is one of its runs, which goes on when the directory's does."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from sapo_jax.training.files import is_remote, read_json, write_json

PROJECT = "sapo_jax"  # where WANDB_PROJECT names none
ID = "wandb.json"


def write(directory: epath.Path, purge_step: int, records: Callable[..., Iterator[dict]]) -> None:
    """See `tracker.TRACKERS`; what earlier starts have sent is not sent again.

    The variables of wandb hold: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline and so on.

    Raises:
      ValueError: nobody has logged in.
    """
    del purge_step  # the steps of wandb cannot be taken back: "iteration" is the axis
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ValueError("nobody has logged in: `wandb login`, or WANDB_MODE=offline")
    workdir = directory.parent
    config = read_json(workdir / "config.json") or {}
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=_id(workdir),
        resume="allow",
        name=workdir.name,
        group=config.get("name"),
        config=config,
        dir=None if is_remote(workdir) else os.fspath(workdir),
        reinit="create_new",  # the runs of a sweep are under way in one process
        settings=wandb.Settings(console="off", silent=True),
    )
    sent = run.summary.get("iteration", -1) if run.resumed else -1
    run.define_metric("*", step_metric="iteration")
    try:
        for record in records():
            if record["iteration"] > sent:
                run.log(_logged(wandb, record))
    finally:
        run.finish()


def _id(workdir: epath.Path) -> str:
    """The id of the run, the same at every start."""
    stored = read_json(workdir / ID, {"id": str})
    if stored is None:
        stored = {"id": secrets.token_hex(4)}
        write_json(workdir / ID, stored)
    return stored["id"]


def _logged(wandb, record: dict) -> dict:
    found = {key: value for key, value in record.items() if isinstance(value, int | float)}
    for key, value in record.items():
        if key.startswith("histogram/") and None not in value["edges"]:
            counts, edges = (np.array(value[name]) for name in ("counts", "edges"))
            found[key] = wandb.Histogram(np_histogram=(counts, edges))
    return found
