"""Adapters as a directory that `peft` loads: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from sapo_jax.model import lora, params
from sapo_jax.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUSED = ("experts_gate", "experts_up")  # one matrix in transformers 5


def check(config: ModelConfig) -> None:
    """Refuse what the directory's names do not tell apart.

    Raises:
      ValueError: adapters on the MLP of dense layers in a model that has experts, too.
    """
    dense = [name for name in lora.KINDS["mlp"] if name in config.lora_targets]
    if dense and config.num_experts:
        raise ValueError(
            f"adapters on {', '.join(dense)} of dense layers beside experts: peft takes both for "
            "experts; merge them with the base instead"
        )


def to_json(config: ModelConfig, alpha: float, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    names = {name.removeprefix("experts_") for name in _stored(config).lora_targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(f"{name}_proj" for name in names),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _stored(config: ModelConfig) -> ModelConfig:
    """With both of what is FUSED where one has adapters: the other's are 0."""
    own = config.lora_targets
    more = FUSED if set(FUSED) & set(own) else ()
    return dataclasses.replace(config, lora_targets=tuple(dict.fromkeys((*own, *more))))


def save(
    directory: str | pathlib.Path,
    config: ModelConfig,
    adapters: Any,
    *,
    alpha: float,
    base: str | None = None,
) -> None:
    """Write the adapters of a policy.

    Args:
      directory: made if need be.
      config: the policy's shape, with its rank and targets.
      adapters: as the learner has them.
      alpha: they count alpha/rank.
      base: the directory or name of the model that they are for.

    Raises:
      ValueError: see `check`.
    """
    from safetensors.numpy import save_file

    check(config)
    directory, layers = pathlib.Path(directory), adapters["layers"]
    directory.mkdir(parents=True, exist_ok=True)
    specs = lora.trained(params.table(_stored(config)), config)["layers"]
    tensors = {
        f"base_model.model.{key}": spec.to_hf(leaf, at)
        for name, spec in specs.items()
        for leaf in [layers[name] if name in layers else np.zeros(spec.shape, np.float32)]
        for at, key in spec.tensors()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    content = json.dumps(to_json(config, alpha, base), indent=2)
    (directory / CONFIG).write_text(content + "\n")
