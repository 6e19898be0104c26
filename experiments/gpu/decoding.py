"""Decoding of Qwen3 shapes with random weights: bytes that a step must read ÷ its time.

A step reads each weight once, and each row's keys and values, those of a shared prompt once for its
rows. Its seconds are those of a rollout, less those of one that ends with the first token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.gpu.timing import attempt, copy_bandwidth
from experiments.gpu.updates import matmul_weights
from sapo_jax import model, sampler
from sapo_jax.sampler.plan import Plan
from sapo_jax.types import Prompts

# name: prompts, completions of each, tokens of a prompt, new tokens
LOADS = {"own prompts": (256, 1, 960, 128), "shared prompts": (32, 8, 512, 512)}
TOY = {"own prompts": (8, 1, 32, 16), "shared prompts": (4, 4, 32, 32)}
POLICIES = ("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")


def rollout_seconds(params: Any, config: Any, load: tuple, new: int, repeats: int) -> float:
    """The least seconds of some rollouts of so many new tokens."""
    import time

    prompts, group, width, _ = load
    rng = np.random.default_rng(0)
    given = Prompts(
        tokens=rng.integers(3, 500, (prompts, width)).astype(np.int32),
        length=np.full(prompts, width, np.int32),
        id=np.arange(prompts, dtype=np.uint32),
        task=np.zeros(prompts, np.int32),
    )
    plan = Plan((prompts,), (new,), max(1, prompts // 8), (group,))
    found = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        out = sampler.rollout(
            params, config, given, group_size=group, max_new_tokens=new, temperature=1.0,
            seed=seed, iteration=0, plan=plan,
        )  # fmt: skip
        jax.block_until_ready(out)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def step_bytes(config: model.ModelConfig, load: tuple) -> float:
    """Weights, and keys and values at half of the completion, in bf16."""
    prompts, group, width, new = load
    entry = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * matmul_weights(config) + entry * prompts * (width + group * new / 2)


def measure(name: str, load: tuple, toy: bool, bandwidth: float) -> dict[str, Any]:
    """Seconds of a step, tokens/s, and the share of the bandwidth."""
    dtypes = {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}
    preset, overrides = ("tiny", {"vocab_size": 512}) if toy else (name, {})
    # One token of the vocabulary stops a completion: next to none does.
    config = model.make(preset, **dtypes, **overrides)
    params = jax.jit(partial(model.params.init, config))(0)
    params = jax.block_until_ready(sampler.to_sampler(params, config))
    prompts, group, _, new = load
    first = rollout_seconds(params, config, load, 1, 2)
    step = (rollout_seconds(params, config, load, new, 2) - first) / (new - 1)
    moved = step_bytes(config, load)
    return {
        "step_s": step, "prefill_s": first, "tokens_per_s": prompts * group / step,
        "bytes": moved, "share_of_copy_bandwidth": moved / step / bandwidth,
    }  # fmt: skip


def main(toy: bool) -> None:
    """Emit a line for each policy and load."""
    bandwidth = copy_bandwidth(2**20 if toy else 2**31)
    for name in POLICIES[:1] if toy else POLICIES:
        for load, sizes in (TOY if toy else LOADS).items():
            what = {"policy": name, "load": load}
            attempt("decoding", what, partial(measure, name, sizes, toy, bandwidth))
