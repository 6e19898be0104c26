"""Loss, gradient and samples of small policies on the device against those of a CPU.

The reference is written by a process that has a CPU only (`reference`); weights and batches are
NumPy's, so that both have the same.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import ours, workload
from experiments.gpu.timing import attempt
from sapo_jax import learner, model, objectives, sampler
from sapo_jax.model import params as parameters
from sapo_jax.types import Prompts

SHAPE = workload.Shape(vocab=512, prompts=4, group=4, prompt=32, completion=96, stop=0.02)
POLICIES = {"dense": "small", "MoE": "tiny_moe"}


def policy(name: str, dtype: str) -> tuple[model.ModelConfig, Any]:
    """A shape, and normal weights by NumPy."""
    stops = {"stop_tokens": SHAPE.stop_ids, "pad_token": workload.PAD, "vocab_size": SHAPE.vocab}
    config = model.make(POLICIES[name], compute_dtype=dtype, cache_dtype=dtype, **stops)
    shapes = jax.eval_shape(partial(parameters.init, config), 0)
    rng = np.random.default_rng(0)

    def draw(path, x):
        scale = np.ones(x.shape) if "norm" in jax.tree_util.keystr(path) else None
        own = rng.normal(0, 0.05, x.shape) if scale is None else scale
        return jnp.asarray(own, x.dtype)

    return config, jax.tree_util.tree_map_with_path(draw, shapes)


def gradient(name: str, dtype: str) -> dict[str, Any]:
    """Loss and gradient of packed rows that share their prompts."""
    config, params = policy(name, dtype)
    rows = workload.rollouts(SHAPE)
    sized = learner.packed_shape(
        SHAPE.rows, SHAPE.prompt, SHAPE.completion, budget=1024, group_size=SHAPE.group
    )
    layout = learner.plan(
        np.full(SHAPE.rows, SHAPE.prompt), rows.length, width=SHAPE.width, shape=sized
    )
    batch = learner.pack(jax.device_put(ours.batch_of(rows)), layout)
    hp = learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-4, 0.0, 1.0, 1.0,
        model=config, micro_batches=sized.micro_batches,
    )  # fmt: skip
    grads, terms = jax.jit(learner.gradient)(params, batch, hp)
    loss = terms["loss"]
    return {"loss": float(loss.numerator / loss.denominator), "grads": jax.device_get(grads)}


def samples(name: str, dtype: str) -> dict[str, np.ndarray]:
    """Completions and their log-probabilities."""
    config, params = policy(name, dtype)
    prompts = Prompts(
        tokens=workload.rollouts(SHAPE).prompt[:: SHAPE.group],
        length=np.full(SHAPE.prompts, SHAPE.prompt, np.int32),
        id=np.arange(SHAPE.prompts, dtype=np.uint32),
        task=np.zeros(SHAPE.prompts, np.int32),
    )
    found = sampler.rollout(
        sampler.to_sampler(params, config), config, prompts, group_size=SHAPE.group,
        max_new_tokens=SHAPE.completion, temperature=1.0, seed=0, iteration=0,
    )  # fmt: skip
    return {"tokens": np.asarray(found.tokens), "logp": np.asarray(found.sampler_logp)}


def reference(path: str) -> None:
    """Write what a CPU computes in f32."""
    found = {name: (gradient(name, "float32"), samples(name, "float32")) for name in POLICIES}
    pathlib.Path(path).write_bytes(pickle.dumps(found))


def _relative(got: Any, want: Any) -> float:
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def compare(name: str, dtype: str, expected: Any) -> dict[str, Any]:
    """How far the device's loss, gradient and samples are from a CPU's in f32.

    A row of samples is compared up to its first other token, which a near-tie explains.
    """
    (want, drawn), got, own = expected, gradient(name, dtype), samples(name, dtype)
    width = SHAPE.prompt
    same = np.cumprod(own["tokens"][:, width:] == drawn["tokens"][:, width:], 1).astype(bool)
    gap = np.where(same, np.abs(own["logp"] - drawn["logp"])[:, -same.shape[1] :], 0)
    return {
        "loss_difference": abs(got["loss"] - want["loss"]),
        "gradient_relative_error": _relative(got["grads"], want["grads"]),
        "rows_of_equal_samples": float(same.all(1).mean()),
        "logp_difference_max": float(gap.max()),
    }


def compile_all(toy: bool) -> None:
    """Emit a line for each policy and dtype."""
    del toy
    with tempfile.TemporaryDirectory() as directory:
        path = str(pathlib.Path(directory) / "reference")
        command = [sys.executable, "-m", "experiments.gpu.parity", path]
        subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        expected = pickle.loads(pathlib.Path(path).read_bytes())
    for name in POLICIES:
        for dtype in ("float32", "bfloat16"):
            what = {"policy": name, "dtype": dtype}
            attempt("parity", what, partial(compare, name, dtype, expected[name]))


if __name__ == "__main__":
    reference(sys.argv[1])
