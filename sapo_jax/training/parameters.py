"""Where parameters come from: drawn, of a Hugging Face directory, or learnt by a run."""

from __future__ import annotations

import dataclasses
import os
import shlex
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sapo_jax import cli, learner
from sapo_jax.model import ModelConfig, hf, lora, params
from sapo_jax.parallel import sharding
from sapo_jax.training import policy, settings
from sapo_jax.training.checkpoint import Checkpoints, find, meta_of, restore_params
from sapo_jax.training.digest import digests, fingerprint, lost
from sapo_jax.training.settings import Settings
from sapo_jax.training.workdir import read_config


def random(run: Settings) -> Any:
    """Initial values of what is trained, on a mesh each part where it belongs from the start."""
    return _drawn(run, run.model, run.config.seed)


def _drawn(run: Settings, shape: ModelConfig, seed: int) -> Any:
    if run.mesh is None:
        return params.init(shape, seed)
    places = lora.trained(params.shardings(shape, run.mesh), shape)
    return jax.jit(params.init, static_argnums=0, out_shardings=places)(shape, seed)


def first(run: Settings, origin: dict | None = None) -> tuple[Any, dict]:
    """The parameters that ``init_from`` names, and which they are.

    Of a run they are those of the checkpoint that ``origin`` names, while it is there. Without a
    name they are the random base of adapters, the same for all seeds: the runs of a population
    share it.
    """
    name, shape, iteration = run.config.init_from, lora.base(run.model), None
    source = epath.Path(name).expanduser()
    if not name:
        weights = _drawn(run, shape, 0)
    elif policy.is_hf(name):
        weights = hf.load(source, dtype=shape.param_dtype, mesh=run.mesh)[1]
    else:
        iteration = (origin or {}).get("checkpoint")
        if iteration not in Checkpoints(source / "checkpoints").committed():
            iteration = find_start(name)
        weights = _of_run(run, source, iteration)
    found = digests({"params": weights})
    if lost(found):
        text = f"config.init_from={name!r}: {lost(found)} is not finite"
        raise ValueError(f"{text}; must be a policy whose numbers are")
    return weights, {"checkpoint": iteration, "fingerprint": fingerprint(found)}


def find_start(name: str) -> int | None:
    """The newest checkpoint in the directory of ``init_from``; None where it is no run's.

    Raises:
      ValueError: there is no such directory, or nothing in it yet.
    """
    if not name or policy.is_hf(name):
        return None
    source = epath.Path(name).expanduser()
    first = "it must be a run's, or a Hugging Face directory"
    if source.name in cli.shipped_configs():
        command = f"python -m sapo_jax.main --config={source.name} --workdir={shlex.quote(name)}"
        first = f"run this first: {command}"
    if not source.exists():
        seen = "" if source.is_absolute() else f" (seen from {os.getcwd()})"
        raise ValueError(f"config.init_from={name!r}: there is no such directory{seen}; {first}")
    try:
        return find(source / "checkpoints")
    except ValueError as error:
        raise ValueError(f"config.init_from={name!r}: {error}; {first}") from None


def _of_run(run: Settings, source: epath.Path, iteration: int) -> Any:
    """The policy of another run, adapters merged, in this one's dtype and where it belongs."""
    shape, stored = lora.base(run.model), read_config(source) or {}
    if (stored.get("lora") or {}).get("rank") or shape.vision:  # parts of it may lie elsewhere
        weights = lora.merge(learnt(settings.of_run(source), source, iteration))
        specs = params.partition_specs(shape)
        weights = jax.tree.map(lambda x, spec: sharding.place(x, run.mesh, spec), weights, specs)
    else:
        masters = dataclasses.replace(shape, param_dtype="float32")
        wanted = learner.abstract(run.hp.replace(model=masters)).params
        weights = restore_params(source / "checkpoints", wanted, iteration=iteration)
    if shape.param_dtype == "float32":
        return weights
    return jax.jit(partial(jax.tree.map, jnp.dtype(shape.param_dtype).type))(weights)


def check(run: Settings, origin: dict | None, now: dict) -> None:
    """Refuse other parameters than those that the run started with.

    Raises:
      ValueError: they are.
    """
    if origin and origin["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"config.init_from={run.config.init_from!r} is not the reference that the run started "
            f"with: then {_described(origin)}, now {_described(now)}; put it back, or start "
            "another --workdir"
        )


def _described(origin: dict) -> str:
    of = "" if origin["checkpoint"] is None else f" of iteration {origin['checkpoint']}"
    return origin["fingerprint"] + of


def learnt(run: Settings, workdir: epath.PathLike, iteration: int) -> Any:
    """What a checkpoint of a run holds, with LoRA beside the base that it belongs to.

    Raises:
      ValueError: there is no such checkpoint, or the base is another one now.
    """
    directory = epath.Path(workdir).expanduser() / "checkpoints"
    weights = restore_params(directory, learner.abstract(run.hp).params, iteration=iteration)
    if not run.model.freezes:
        return weights
    origin = meta_of(directory, iteration)["reference"]
    base, now = first(run, origin)
    check(run, origin, now)
    return lora.join(weights, lora.frozen(base, run.model), run.hp.lora_scale)
