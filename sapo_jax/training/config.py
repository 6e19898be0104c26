"""The fields of an experiment, read as attributes; configs/base.py says what each of them means."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

_section = dataclasses.dataclass(frozen=True)


def _open() -> Any:
    """A field with everything that its section holds besides: open-ended, so a mapping."""
    return dataclasses.field(metadata={"open": True})


@_section
class _Data:
    max_prompt_tokens: int
    workers: int


@_section
class _Tokenizer:
    directory: str
    chat: bool
    system: str
    template_options: Mapping[str, Any]


@_section
class _Model:
    preset: str
    attention: str
    shape: Mapping[str, int | None] = _open()


@_section
class _Dtype:
    params: str
    compute: str
    cache: str


@_section
class _Objective:
    name: str
    aggregation: str | None
    kl: str
    hyperparameters: Mapping[str, float | None] = _open()


@_section
class _Correction:
    name: str
    bounds: Mapping[str, float | None] = _open()


@_section
class _Reward:
    workers: int
    kl_coef: float
    kl: str
    recipe: Mapping[str, Any] = _open()


@_section
class _Batch:
    prompts: int
    oversample: int
    group_size: int
    minibatches: int
    micro_batches: int


@_section
class _Sampler:
    max_new_tokens: int
    temperature: float
    slots: int
    shrink: int


@_section
class _Learner:
    learning_rate: float
    schedule: str
    warmup: int
    weight_decay: float
    max_grad_norm: float
    b1: float
    b2: float
    eps: float
    old_logp: str
    routing_replay: str
    router_aux_coef: float
    head_chunk: int
    remat: bool


@_section
class _Eval:
    every: int
    prompts: int
    samples: int
    temperature: float
    top_k: int | None
    top_p: float | None


@_section
class _Population:
    method: str


@_section
class _Distributed:
    timeout: float


@_section
class _Checkpoint:
    every: int


@_section
class _Log:
    samples_every: int
    samples: int


@_section
class Config:
    """An experiment."""

    name: str
    seed: int
    source: str
    init_from: str
    iterations: int
    task: Mapping[str, Any]
    tasks: Mapping[str, Any]
    data: _Data
    tokenizer: _Tokenizer
    model: _Model
    dtype: _Dtype
    mesh: Mapping[str, int]
    objective: _Objective
    correction: _Correction
    reward: _Reward
    advantages: str
    batch: _Batch
    sampler: _Sampler
    learner: _Learner
    eval: _Eval
    population: _Population
    distributed: _Distributed
    checkpoint: _Checkpoint
    log: _Log
    profile_steps: int
    compilation_cache: str


def read(values: Mapping[str, Any], kind: Any = Config, prefix: str = "") -> Any:
    """The config that a dictionary, as a run directory stores it, is of.

    Raises:
      ValueError: a field is missing.
    """
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], field.name
        if field.metadata.get("open"):
            given[name] = {key: value for key, value in values.items() if key not in hints}
        elif name not in values:
            raise ValueError(f"config.{prefix}{name} is missing: configs/base.py has every field")
        else:
            section = dataclasses.is_dataclass(hint)
            given[name] = read(values[name], hint, f"{name}.") if section else values[name]
    return kind(**given)
