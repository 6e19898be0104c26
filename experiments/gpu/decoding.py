"""Decoding of Qwen3 shapes with random weights: bytes that a step must read ÷ its time.

A step reads each weight once, and each row's keys and values, those of a shared prompt once for its
rows. Its seconds are those of a rollout, less those of one that ends with the first token.
"""

from __future__ import annotations

from concurrent import futures
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.gpu.timing import attempt, copy_bandwidth, kernels, seconds
from experiments.gpu.updates import matmul_weights
from sapo_jax import model, sampler
from sapo_jax.sampler.plan import Plan
from sapo_jax.types import Prompts

# name: prompts, completions of each, tokens of a prompt, new tokens
LOADS = {"own prompts": (256, 1, 960, 128), "shared prompts": (32, 8, 512, 512)}
TOY = {"own prompts": (8, 1, 32, 16), "shared prompts": (4, 4, 32, 32)}
POLICIES = ("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")


def rollout(params: Any, config: Any, load: tuple, new: int, **options: Any) -> Any:
    """A rollout of so many new tokens."""
    prompts, group, width, _ = load
    rng = np.random.default_rng(0)
    given = Prompts(
        tokens=rng.integers(3, 500, (prompts, width)).astype(np.int32),
        length=np.full(prompts, width, np.int32),
        id=np.arange(prompts, dtype=np.uint32),
        task=np.zeros(prompts, np.int32),
    )
    plan = Plan((prompts,), (new,), max(1, prompts // 8), (group,))
    found = sampler.rollout(
        params, config, given, group_size=group, max_new_tokens=new, temperature=1.0,
        seed=0, iteration=0, plan=plan, **options,
    )  # fmt: skip
    return jax.block_until_ready(found)


def step_bytes(config: model.ModelConfig, load: tuple) -> float:
    """Weights, and keys and values at half of the completion, in bf16."""
    prompts, group, width, new = load
    entry = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * matmul_weights(config) + entry * prompts * (width + group * new / 2)


def policy(name: str, toy: bool) -> tuple[model.ModelConfig, Any]:
    """A shape, and what makes its weights as the sampler has them."""
    dtypes = {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}
    config = model.make("tiny", vocab_size=512, **dtypes) if toy else model.make(name, **dtypes)
    init = jax.jit(partial(model.params.init, config))
    return config, lambda: jax.block_until_ready(sampler.to_sampler(init(0), config))


def compile_all(toy: bool) -> None:
    """Fill the compilation cache: nothing is timed now."""
    for name in POLICIES:
        config, make = policy(name, toy)
        params = make()
        with futures.ThreadPoolExecutor() as pool:
            for load in (TOY if toy else LOADS).values():
                for new in (1, load[-1]):
                    options = {"warm_up": lambda line: None}
                    pool.submit(rollout, params, config, load, new, **options)


def measure(name: str, load: tuple, toy: bool, bandwidth: float) -> dict[str, Any]:
    """Seconds of a step, tokens/s, and the share of the bandwidth."""
    config, make = policy(name, toy)
    params = make()
    prompts, group, _, new = load
    first = seconds(lambda: rollout(params, config, load, 1), repeats=2)
    step = (seconds(lambda: rollout(params, config, load, new), repeats=2) - first) / (new - 1)
    moved = step_bytes(config, load)
    found = {
        "step_s": step, "prefill_s": first, "tokens_per_s": prompts * group / step,
        "bytes": moved, "share_of_copy_bandwidth": moved / step / bandwidth,
    }  # fmt: skip
    if not toy:
        found["kernels_ms"] = kernels(lambda: rollout(params, config, load, new))
    return found


def main(toy: bool) -> None:
    """Emit a line for each policy and load."""
    bandwidth = copy_bandwidth(2**20 if toy else 2**31)
    for name in POLICIES[:1] if toy else POLICIES:
        for load, sizes in (TOY if toy else LOADS).items():
            what = {"policy": name, "load": load}
            attempt("decoding", what, partial(measure, name, sizes, toy, bandwidth))
