"""Contestants of google-tunix: ``python -m experiments.benchmarks.peers.tunix NAME SHAPE``.

Its Qwen3, GRPOLearner's training step (it has no SAPO: the loss is GRPO's) and its Sampler.
"""

from __future__ import annotations

import os
import sys
from functools import partial

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as samplers
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import sharding_utils

from experiments.benchmarks import contestant, workload


class Numbers:
    """A tokenizer for texts of token ids."""

    def encode(self, text, **_):
        """A text's ids."""
        return list(map(int, text.split()))

    def decode(self, ids, **_):
        """The ids' text."""
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        """No token before the prompt."""
        return None

    def eos_id(self):
        """One that ends nothing here."""
        return 2

    def pad_id(self):
        """The pad."""
        return workload.PAD


def policy(shape):
    """tunix's model with the workload's weights; its rotary base is 1e6 whatever is said."""
    config = qwen3.ModelConfig(
        num_layers=shape.layers, vocab_size=shape.vocab, embed_dim=shape.hidden,
        hidden_dim=shape.mlp, num_heads=shape.heads, head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads, rope_theta=int(workload.ROPE_THETA),
        norm_eps=workload.NORM_EPS, use_tied_embedding=True,
    )  # fmt: skip
    model, found = qwen3.Qwen3(config, rngs=nnx.Rngs(0)), workload.weights(shape)

    def put(param, name, shaped=None, transpose=False):
        value = found.pop(name + ".weight")
        value = value.T if transpose else value
        value = value if shaped is None else value.reshape(shaped)
        if param[...].shape != value.shape:
            raise ValueError(f"{name}: {param[...].shape} is not {value.shape}")
        param[...] = jnp.asarray(value)

    put(model.embedder.input_embedding, "model.embed_tokens")
    put(model.final_norm.w, "model.norm")
    for i, layer in enumerate(model.layers):
        at, own = f"model.layers.{i}.", layer.attn
        put(layer.input_layernorm.w, at + "input_layernorm")
        put(layer.post_attention_layernorm.w, at + "post_attention_layernorm")
        for param, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            size = (shape.hidden, heads, shape.head_dim)
            put(getattr(own, f"{param}_proj").w, f"{at}self_attn.{param}_proj", size, True)
        size = (shape.heads, shape.head_dim, shape.hidden)
        put(own.o_proj.w, at + "self_attn.o_proj", size, True)
        put(own.q_norm.w, at + "self_attn.q_norm")
        put(own.k_norm.w, at + "self_attn.k_norm")
        for name in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, name).kernel, f"{at}mlp.{name}", None, True)
    if found:
        raise ValueError(f"weights without a place: {sorted(found)}")
    return model


def facts():
    """Versions."""
    return {"tunix": version("google-tunix"), "jax": jax.__version__}


def update(shape):
    """The training step that GRPOLearner makes, on one device."""
    adamw = optax.adamw(
        workload.LEARNING_RATE, workload.B1, workload.B2, workload.EPS,
        weight_decay=workload.WEIGHT_DECAY,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=policy(shape),
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla", offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=adamw, eval_every_n_steps=10**9, max_steps=10**9,
                mini_batch_size=shape.prompts, train_micro_batch_size=shape.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=shape.completion, max_prompt_length=shape.prompt,
                kv_cache_size=shape.width, temperature=1.0, top_p=1.0, top_k=None,
            ),
        ),
    )  # fmt: skip
    grpo_learner.GRPOLearner(  # it gives the trainer its loss
        rl_cluster=cluster,
        reward_fns=lambda prompts, completions, **_: [0.0] * len(completions),
        algo_config=grpo_learner.GRPOConfig(
            num_generations=shape.group, num_iterations=2, beta=0.0, epsilon=workload.CLIP,
            loss_algo="grpo",
        ),
    )  # fmt: skip
    trainer, rows = cluster.actor_trainer, workload.rollouts(shape)
    example = grpo_learner.TrainExample(
        prompt_ids=jnp.asarray(rows.prompt), prompt_mask=jnp.ones(rows.prompt.shape, bool),
        completion_ids=jnp.asarray(np.where(rows.mask, rows.completion, workload.PAD)),
        completion_mask=jnp.asarray(rows.mask), advantages=jnp.asarray(rows.advantages),
        ref_per_token_logps=None, old_per_token_logps=jnp.asarray(rows.old_logp),
    )  # fmt: skip
    with mesh:
        example = sharding_utils.shard_input(example, trainer.config.data_sharding_axis)
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def once():
        with mesh:
            loss, _, norm = step(example)
            jax.block_until_ready((nnx.state(trainer.model), norm))
        return {"loss": float(loss)}

    return once, {"objective": "grpo", **facts()}


def generate(shape):
    """Its Sampler, with log-probabilities as an importance ratio needs them."""
    cache = samplers.CacheConfig(
        cache_size=shape.width, num_layers=shape.layers, num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )  # fmt: skip
    sampler, seeds = samplers.Sampler(policy(shape), Numbers(), cache), iter(range(10**9))
    prompts = [" ".join(map(str, row)) for row in workload.rollouts(shape).prompt]

    def once():
        out = sampler(
            prompts, max_generation_steps=shape.completion, max_prompt_length=shape.prompt,
            temperature=1.0, top_p=1.0, top_k=None, eos_tokens=list(shape.stop_ids),
            seed=next(seeds), return_logprobs=True,
        )  # fmt: skip
        return {"tokens": sum(len(row) for row in out.tokens)}

    return once, facts()


CONTESTANTS = {"update": update, "generate": generate}

if __name__ == "__main__":
    name, shape = sys.argv[1:]
    contestant.serve(partial(CONTESTANTS[name], workload.SHAPES[shape]))
