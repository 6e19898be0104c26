"""Updates of Qwen3 shapes with random weights: seconds, memory, and model FLOPs of the peak.

Model FLOPs a token are 6 · weights in matrix products + 6 · layers · heads · head_dim · S, which
counts causal attention's half square; what is computed again in the backward pass does not count.
"""

from __future__ import annotations

from concurrent import futures
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.gpu.timing import attempt, compiled, kernels, matmul_peak, seconds
from sapo_jax import learner, model, objectives
from sapo_jax.types import Batch

LENGTH, PROMPT = 4096, 512
# policy: (overrides, rows of an update, micro-batches, whether layers are recomputed)
POLICIES = {
    "qwen3_1_7b": ({}, 8, 2, False),
    "qwen3_4b": ({}, 4, 2, False),
    "qwen3_0_6b": ({}, 16, 2, False),
    "qwen3_30b_a3b": ({"num_hidden_layers": 4}, 8, 2, False),
}


def batch_of(rows: int, length: int, prompt: int, vocab: int) -> Batch:
    """Whole rows of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab, (rows, length)).astype(np.int32)
    logp = np.full((rows, length), -np.log(vocab), np.float32)
    return jax.device_put(
        Batch(
            tokens=tokens, mask=np.tile(np.arange(length) >= prompt, (rows, 1)),
            segments=np.ones((rows, length), np.int32), sampler_logp=logp, old_logp=logp,
            advantages=rng.normal(size=rows).astype(np.float32),
        )
    )  # fmt: skip


def hyperparameters(config: model.ModelConfig, micro: int, remat: bool) -> learner.Hyperparameters:
    """Those of an update by SAPO."""
    chunk = model.head.chunk_size(config.vocab_size, "gpu")
    return learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-6, 0.0, 1.0, 1.0,
        model=config, micro_batches=micro, remat=remat, head_chunk=chunk,
    )  # fmt: skip


def matmul_weights(config: model.ModelConfig) -> int:
    """Weights that meet each token in a matrix product; the head once."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    width, sparse = config.intermediate_size, len(config.sparse_layers)
    dense = config.num_hidden_layers - sparse
    routed = config.num_experts_per_tok * config.moe_intermediate_size if sparse else 0
    mlp = 3 * (dense * width + sparse * routed) + sparse * config.num_experts
    return config.hidden_size * (config.num_hidden_layers * heads + mlp + config.vocab_size)


def model_flops(config: model.ModelConfig, rows: int, length: int) -> float:
    """Of an update."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6.0 * rows * length * (matmul_weights(config) + attention)


def program(name: str, toy: bool) -> tuple[model.ModelConfig, Any, tuple]:
    """A policy's shape, what makes its state and batch, and their shapes with hyperparameters."""
    overrides, rows, micro, remat = POLICIES[name]
    length, prompt = (256, 32) if toy else (LENGTH, PROMPT)
    if toy:
        name = "tiny_moe" if name.endswith("a3b") else "tiny"
        overrides = {"vocab_size": 512}
    config = model.make(name, compute_dtype="bfloat16", cache_dtype="bfloat16", **overrides)
    hp = hyperparameters(config, micro, remat)

    def make():
        params = jax.jit(partial(model.params.init, config))(0)
        return learner.init(params, hp), batch_of(rows, length, prompt, 500)

    return config, make, (*jax.eval_shape(make), hp)


def compile_all(toy: bool) -> None:
    """Fill the compilation cache, all at once: nothing is timed now."""
    with futures.ThreadPoolExecutor() as pool:
        for arguments in [program(name, toy)[2] for name in POLICIES]:
            pool.submit(lambda arguments: learner.update.lower(*arguments).compile(), arguments)


def measure(name: str, toy: bool, peak: float) -> dict[str, Any]:
    """An update's seconds and share of the peak."""
    config, make, arguments = program(name, toy)
    run, facts = compiled(learner.update, *arguments)
    (state, batch), hp = make(), arguments[-1]
    held = [state]
    del state

    def once():
        held[0], metrics = run(held[0], batch, hp)
        return metrics["grad/norm"].numerator

    spent = seconds(once, repeats=3)
    rows, length = batch.tokens.shape
    flops = model_flops(config, rows, length)
    return {
        "rows": rows, "length": length, "micro_batches": hp.static.micro_batches,
        "remat": hp.static.remat, "seconds": spent, "tokens_per_s": rows * length / spent,
        "model_flops": flops, "mfu_of_measured_peak": flops / spent / peak,
        "grad_norm": float(once()), **facts, **({} if toy else {"kernels_ms": kernels(once)}),
    }  # fmt: skip


def main(toy: bool) -> None:
    """Emit a line for each policy."""
    peak = matmul_peak(256 if toy else 8192)
    for name in POLICIES:
        attempt("updates", {"policy": name}, partial(measure, name, toy, peak))
