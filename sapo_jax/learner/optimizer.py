"""What an update is told and what it changes: hyperparameters, the optimizer, and its state."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from sapo_jax.model import params
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective
from sapo_jax.parallel import sharding
from sapo_jax.types import TrainState

SCHEDULES = ("constant", "linear", "cosine")


@struct.dataclass
class Hyperparameters:
    """Everything an update is told besides its state and batch.

    Attributes:
      objective: from `objectives.resolve`.
      learning_rate: the schedule's peak.
      weight_decay: decoupled, on matrices only.
      max_grad_norm: gradients are clipped to this global norm; inf switches it off.
      temperature: of the policy, as in the sampler.
      model: the model's shape.
      micro_batches: forward-backward passes an update; they change memory, not the result.
      head_chunk: rows whose logits exist at a time.
      remat: recompute each layer in the backward pass.
      kl: estimator of the KL penalty, see `objectives.kl_estimate`.
      schedule: one of SCHEDULES; ``warmup`` and ``total`` are in updates.
      b1, b2, eps: Adam's.
      routing_replay: one of `routing.REPLAY`; other than "none", the experts are those of
        ``batch.routing``, with the gates of the present router.
      router_aux_coef: weight of the load-balancing loss; None switches it off.
      mesh: from `sharding.make_mesh`; None computes on one device. State and batches lie on it as
        `shardings` and `sharding.place` place them.
    """

    objective: Objective
    learning_rate: jax.Array | float
    weight_decay: jax.Array | float
    max_grad_norm: jax.Array | float
    temperature: jax.Array | float
    model: ModelConfig = struct.field(pytree_node=False)
    micro_batches: int = struct.field(pytree_node=False, default=1)
    head_chunk: int = struct.field(pytree_node=False, default=1024)
    remat: bool = struct.field(pytree_node=False, default=False)
    kl: str = struct.field(pytree_node=False, default="k3")
    schedule: str = struct.field(pytree_node=False, default="constant")
    warmup: int = struct.field(pytree_node=False, default=0)
    total: int = struct.field(pytree_node=False, default=0)
    b1: float = struct.field(pytree_node=False, default=0.9)
    b2: float = struct.field(pytree_node=False, default=0.95)
    eps: float = struct.field(pytree_node=False, default=1e-8)
    routing_replay: str = struct.field(pytree_node=False, default="none")
    router_aux_coef: jax.Array | float | None = None
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)


def learning_rate(hp: Hyperparameters, update: jax.Array) -> jax.Array:
    """The learning rate of an update (from 0): linear warm-up to the peak, then the schedule."""
    rest = max(1, hp.total - hp.warmup)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
    }[hp.schedule]
    warm = optax.linear_schedule(1 / max(1, hp.warmup), 1.0, max(1, hp.warmup - 1))
    factor = optax.join_schedules([warm, after], [hp.warmup])(update)
    return jnp.float32(hp.learning_rate) * factor


def _matrices(tree: Any, config: ModelConfig) -> Any:
    """Which parameters decay: those of the table that are not norms."""
    del tree
    return jax.tree.map(
        lambda spec: spec.fan_in > 0,
        params.table(config),
        is_leaf=lambda x: isinstance(x, params.Spec),
    )


def optimizer(hp: Hyperparameters, rate: jax.Array) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind clipping by global norm; its state depends on no setting."""
    return optax.chain(
        optax.clip_by_global_norm(hp.max_grad_norm),
        optax.scale_by_adam(hp.b1, hp.b2, hp.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(hp.weight_decay, partial(_matrices, config=hp.model)),
        optax.scale(-rate),
    )


@jax.jit
def init(weights: Any, hp: Hyperparameters) -> TrainState:
    """The state before the first iteration."""
    zero = jnp.int32(0)
    opt_state = optimizer(hp, learning_rate(hp, zero)).init(weights)
    return sharding.constrain(TrainState(zero, zero, weights, opt_state), hp.mesh, specs(hp))


def specs(hp: Hyperparameters) -> TrainState:
    """Where the state lies: the optimizer's moments where their parameters do."""
    whole, weights = PartitionSpec(), params.partition_specs(hp.model)
    step = optimizer(hp, jnp.float32(0))
    opt_state = jax.eval_shape(step.init, params.abstract(hp.model))
    placed = optax.tree_map_params(
        step, lambda _, s: s, opt_state, weights, transform_non_params=lambda _: whole
    )
    return TrainState(whole, whole, weights, placed)


def abstract(hp: Hyperparameters) -> TrainState:
    """Shapes, dtypes and, on a mesh, shardings of the state."""
    state = jax.eval_shape(init, params.abstract(hp.model), hp)
    if hp.mesh is None:
        return state
    places = sharding.shardings(hp.mesh, specs(hp))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
