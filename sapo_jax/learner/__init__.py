"""Updates: one optimizer step is one program for every value of the traced hyperparameters.

    state = init(params, hp)
    minibatches, metrics = make_minibatches(batch, rewards_B, kl_coef, bounds, …)
    state, record = learn(state, minibatches, hp)

The page of what this wing gives to others:

    Hyperparameters   numbers, traced, and `Static`, which shapes programs          optimizer.py
    init, abstract    the state before the first iteration, and its shapes
    abstract_frozen   those of what it leaves as it is: with LoRA, the base
    partition_specs   where the state lies on a mesh
    learning_rate     of an update, by one of SCHEDULES
    make_minibatches  advantages, KL in the reward, sampler corrections             minibatches.py
    split_rows        rows as minibatches; `select_rows`, some rows as one batch
    packed_shape      rows without pads, and prompts that are shared: a `PackedShape`;
    plan, pack        a `Layout` from lengths, on the host; rows into it; `unpack`   packing.py
    score             log π of a batch, by the programs of an update              scores.py
    score_routing     the same, and the routing that R2 replays
    forward, map_rows what they are made of; by micro-batches
    gradient          of the loss of a minibatch, and its metrics                gradients.py
    update            one optimizer step: (state, batch, hp) → (state, metrics)       step.py
    learn             an iteration's updates, and their metrics as plain numbers: by
                      `finish_iteration`, `record` and `end_iteration`
"""

from sapo_jax.learner.gradients import gradient
from sapo_jax.learner.minibatches import make_minibatches, select_rows, split_rows
from sapo_jax.learner.optimizer import (
    SCHEDULES,
    Hyperparameters,
    Static,
    abstract,
    abstract_frozen,
    init,
    learning_rate,
    partition_specs,
)
from sapo_jax.learner.packing import Layout, pack, plan, unpack
from sapo_jax.learner.packing import Shape as PackedShape
from sapo_jax.learner.packing import make_shape as packed_shape
from sapo_jax.learner.scores import forward, map_rows, score, score_routing
from sapo_jax.learner.step import end_iteration, finish_iteration, learn, record, update

__all__ = [
    "SCHEDULES", "Hyperparameters", "Layout", "PackedShape", "Static", "abstract",
    "abstract_frozen", "end_iteration", "finish_iteration", "forward", "gradient", "init", "learn",
    "learning_rate", "make_minibatches", "map_rows", "pack", "packed_shape", "partition_specs",
    "plan", "record", "score", "score_routing", "select_rows", "split_rows", "unpack", "update",
]  # fmt: skip
