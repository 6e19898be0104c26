"""Contestants of this project: ``python -m experiments.benchmarks.ours NAME SHAPE``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from experiments.benchmarks import contestant, workload
from experiments.benchmarks.workload import Shape
from sapo_jax import learner, model, objectives, sampler
from sapo_jax.learner.packing import micro_tokens, sharing_pays
from sapo_jax.model import attention, blocked, head
from sapo_jax.types import Batch, Prompts

Built = tuple[Callable[[], dict[str, Any]], dict[str, Any]]
UNPACKED = 1


def policy(shape: Shape, **fields: Any) -> tuple[model.ModelConfig, Any]:
    """The shape and weights, by way of a Hugging Face directory."""
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "hidden_act": "silu",
        "rms_norm_eps": workload.NORM_EPS, "rope_theta": workload.ROPE_THETA,
        "max_position_embeddings": max(2048, shape.width), "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        (path / "config.json").write_text(json.dumps(config))
        save_file(workload.weights(shape), str(path / "model.safetensors"))
        shaped, params = model.hf.load(path)
    stops = {"stop_tokens": shape.stop_ids, "pad_token": workload.PAD} | fields
    return dataclasses.replace(shaped, **stops), jax.device_put(params)


def prompts_of(shape: Shape) -> Prompts:
    """One prompt of each group, as the sampler takes them."""
    return Prompts(
        tokens=workload.rollouts(shape).prompt[:: shape.group],
        length=np.full(shape.prompts, shape.prompt, np.int32),
        id=np.arange(shape.prompts, dtype=np.uint32),
        task=np.zeros(shape.prompts, np.int32),
    )


def batch_of(rows: workload.Rollouts) -> Batch:
    """Left-aligned rows as the learner takes them."""
    p, t = rows.prompt.shape[1], rows.completion.shape[1]
    exists = np.concatenate([np.ones_like(rows.prompt, bool), rows.mask], 1)
    tokens = np.concatenate([rows.prompt, rows.completion], 1)
    old_logp = np.pad(rows.old_logp, ((0, 0), (p, 0)))
    return Batch(
        tokens=np.where(exists, tokens, workload.PAD),
        mask=exists & (np.arange(p + t) >= p),
        segments=exists.astype(np.int32),
        sampler_logp=old_logp, old_logp=old_logp, advantages=rows.advantages,
    )  # fmt: skip


def learnt(
    shape: Shape, rows: workload.Rollouts, pack: bool = True, share: bool | None = None
) -> tuple[Callable[[], Batch], int, int]:
    """(what makes the batch of an update, micro-batches, tokens of a block of attention)."""
    budget, batch = micro_tokens("cpu", shape.width), jax.device_put(batch_of(rows))
    if not pack:
        return lambda: batch, UNPACKED, blocked.BLOCK
    if share is None:  # as configs have it
        share = sharing_pays(shape.prompt, shape.completion, shape.group, budget)
    sized = learner.packed_shape(
        shape.rows, shape.prompt, shape.completion, budget=budget,
        group_size=shape.group if share else 1,
    )  # fmt: skip
    prompts = np.full(shape.rows, shape.prompt)

    def given() -> Batch:
        layout = learner.plan(prompts, rows.length, width=shape.width, shape=sized)
        return learner.pack(batch, layout)

    return given, sized.micro_batches, blocked.block_size(sized.segment)


def update(
    shape: Shape, *, pack: bool = True, share: bool | None = None, objective: str = "sapo"
) -> Built:
    """One optimizer step on all rows; moving the rows together is a part of it."""
    config, params = policy(shape)
    rows = workload.rollouts(shape)
    cross_entropy = objective == "cross_entropy"
    if cross_entropy:
        rows = dataclasses.replace(rows, advantages=np.ones(shape.rows, np.float32))
    given, micro, block = learnt(shape, rows, pack, share)
    hp = learner.Hyperparameters(
        objectives.resolve("reinforce" if cross_entropy else objective),
        workload.LEARNING_RATE, workload.WEIGHT_DECAY, 1.0, 1.0,
        model=config, micro_batches=micro, block=block,
        b1=workload.B1, b2=workload.B2, eps=workload.EPS,
    )  # fmt: skip
    state = learner.init(params, hp)

    def once():
        nonlocal state
        state, metrics = learner.update(state, given(), hp)
        jax.block_until_ready(state)
        return {"loss": float(objectives.finish(metrics)[0])}

    own, start = given(), time.perf_counter()
    memory = learner.update.lower(state, own, hp).compile().memory_analysis()
    compile_s = round(time.perf_counter() - start, 3)
    tokens = int(shape.rows * shape.prompt + rows.length.sum())
    facts = {"objective": objective, "tokens": tokens, "compile_s": compile_s,
             "temp_bytes": memory.temp_size_in_bytes}  # fmt: skip
    return once, facts | {"flops": shape.update_flops() * tokens / (shape.rows * shape.width)}


def products(shape: Shape) -> Built:
    """The bare matrix products of an update's weights, forward and backward, its pads included."""
    given, micro, _ = learnt(shape, workload.rollouts(shape))
    rng, tokens = np.random.default_rng(0), given().tokens.size // micro
    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = ((d, q), (d, kv), (d, kv), (q, d), (d, shape.mlp), (d, shape.mlp), (shape.mlp, d))
    sizes = (*layer * shape.layers, (d, shape.vocab))

    def normal(*size, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, size), jnp.float32)

    weights = [normal(n, m, scale=n**-0.5) for n, m in sizes]
    # Each product has arrays of its own, so that none is computed once for several.
    pairs = [(normal(tokens, n), normal(tokens, m)) for n, m in sizes]

    def visit(d_weights, i):
        out = []
        for (x, d_y), w, d_w in zip(pairs, weights, d_weights, strict=True):
            x, d_y = x + i, d_y + i  # of this micro-batch, so that none is moved out of the loop
            out.append((d_w + x.T @ d_y, (x @ w).max(), (d_y @ w.T).max()))
        d_weights, *others = zip(*out, strict=True)
        return list(d_weights), others

    start = [jnp.zeros_like(w) for w in weights]
    run = jax.jit(lambda start: jax.lax.scan(visit, start, jnp.arange(micro, dtype=jnp.float32)))
    flops = 6 * micro * tokens * sum(n * m for n, m in sizes)
    return _once(run, (start,)), {"flops": flops}


def attention_alone(shape: Shape) -> Built:
    """The attention of an update's layers, forward and backward, rotary positions left out."""
    given, _, block = learnt(shape, workload.rollouts(shape))
    batch, rng = given(), np.random.default_rng(0)

    def normal(heads):
        size = (*batch.tokens.shape, heads, shape.head_dim)
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    qkv, d_out = (normal(shape.heads), *(normal(shape.kv_heads) for _ in "kv")), normal(shape.heads)

    def layer(d_out, _):
        out, pull = jax.vjp(
            lambda q, k, v: attention.causal(
                q, k, v, batch.segments, prefix_BS=batch.prefix, block=block
            ), *qkv
        )  # fmt: skip
        d_q, d_k, d_v = pull(d_out)
        return d_out + 1e-6 * (out + d_q), (d_k.sum(), d_v.sum())

    run = jax.jit(lambda d_out: jax.lax.scan(layer, d_out, length=shape.layers))
    return _once(run, (d_out,)), {}


def _once(run: Callable, arguments: tuple) -> Callable[[], dict[str, Any]]:
    def once():
        jax.block_until_ready(run(*arguments))
        return {}

    return once


def generate(shape: Shape) -> Built:
    """Sample a group for each prompt, log-probabilities included."""
    config, params = policy(shape)
    weights, seeds = sampler.to_sampler(params, config), iter(range(10**9))
    prompts = prompts_of(shape)

    def once():
        found = sampler.rollout(
            weights, config, prompts, group_size=shape.group, max_new_tokens=shape.completion,
            temperature=1.0, seed=next(seeds), iteration=0,
        )  # fmt: skip
        return {"tokens": int(jax.block_until_ready(found).mask.sum())}

    return once, {}


def loss_head(*, bare: bool, vocab: int = 151_936, width: int = 1024, tokens: int = 8192) -> Built:
    """The head alone, forward and backward; ``bare``: its three matrix products only."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32)
    weight = jnp.asarray(rng.normal(0, 0.02, (vocab, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    chunk = head.chunk_size(vocab, "cpu")

    def ours(hidden, weight):
        index = jnp.arange(tokens, dtype=jnp.int32)
        wanted = head.Tokens(targets, index, jnp.ones(tokens, bool))
        own = jnp.ones(tokens), None
        arguments = (hidden, weight, wanted, jnp.float32(1), chunk)
        return head.token_loss(lambda logp, own: logp * own[0], own, *arguments)[0]

    def products(hidden, weight):  # in the same chunks, so that no more memory is touched
        def visit(d_weight, h):
            logits = h @ weight.T
            return d_weight + logits.T @ h, logits @ weight

        return jax.lax.scan(visit, jnp.zeros_like(weight), hidden.reshape(-1, chunk, width))

    run = jax.jit(products if bare else jax.grad(ours, (0, 1))).lower(hidden, weight).compile()

    def once():
        jax.block_until_ready(run(hidden, weight))
        return {}

    temp = run.memory_analysis().temp_size_in_bytes
    return once, {"flops": 6 * tokens * vocab * width, "temp_bytes": temp,
                  "temp_share_of_logits": temp / (4 * tokens * vocab)}  # fmt: skip


def peak(shape: Shape) -> Built:
    """The machine's own rate: products of 2048³."""
    del shape
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 2048)), jnp.float32)
    multiply = jax.jit(jnp.matmul)

    def once():
        for _ in range(3):
            jax.block_until_ready(multiply(x, x))
        return {}

    return once, {"flops": 3 * 2 * 2048**3}


CONTESTANTS: dict[str, Callable[[Shape], Built]] = {
    "update": update,
    "update_packed": partial(update, share=False),
    "update_rows": partial(update, pack=False),
    "update_grpo": partial(update, objective="grpo"),
    "update_cross_entropy": partial(update, objective="cross_entropy"),
    "products": products,
    "attention": attention_alone,
    "generate": generate,
    "head": lambda shape: loss_head(bare=False),
    "head_products": lambda shape: loss_head(bare=True),
    "peak": peak,
}

if __name__ == "__main__":
    name, shape = sys.argv[1:]
    contestant.serve(partial(CONTESTANTS[name], workload.SHAPES[shape]))
