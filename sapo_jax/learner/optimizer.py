"""Hyperparameters, the optimizer, and its state."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from sapo_jax import model
from sapo_jax.model import blocked, lora
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective, Schedule, Switch
from sapo_jax.parallel import sharding
from sapo_jax.types import Frozen, TrainState

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Static:
    """What shapes the programs of an update: another value compiles another program.

    Attributes:
      model: the model's shape.
      micro_batches: forward-backward passes an update; they change memory, not the result.
      head_chunk: tokens whose logits exist at a time.
      block: tokens of a block of attention, see `blocked.block_size`.
      remat: recompute each layer in the backward pass.
      kl: estimator of the KL penalty, see `objectives.kl`.
      schedule: one of SCHEDULES; ``warmup`` and ``total`` are in updates.
      b1, b2, eps: Adam's.
      routing_replay: one of `routing.REPLAY`; other than "none", the experts are those of
        ``batch.routing``, with the gates of the present router.
      mesh: from `sharding.make_mesh`; None computes on one device. State and batches lie on it as
        `shardings` and `sharding.place` place them.
    """

    model: ModelConfig
    micro_batches: int = 1
    head_chunk: int = 1024
    block: int = blocked.BLOCK
    remat: bool = False
    kl: str = "k3"
    schedule: str = "constant"
    warmup: int = 0
    total: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    routing_replay: str = "none"
    mesh: Mesh | None = None


@partial(struct.dataclass, init=False)
class Hyperparameters:
    """The numbers of an update, which are traced, and ``static``, which shapes its programs.

    Made and replaced by one flat list of names, `Static`'s among them:
    ``Hyperparameters(objective, 1e-6, 0.1, 1.0, 1.0, model=config, micro_batches=4)`` and
    ``hp.replace(learning_rate=1e-5, micro_batches=8)``.

    Attributes:
      objective: from `objectives.resolve`.
      learning_rate: the schedule's peak.
      weight_decay: decoupled, on matrices only.
      max_grad_norm: gradients are clipped to this global norm; inf switches it off.
      temperature: of the policy, as in the sampler.
      router_aux_coef: weight of the load-balancing loss; None switches it off.
      objective_schedule: of its numbers, over the iterations; None keeps them as they are.
      lora_scale: alpha/rank, what adapters count beside their projections; None without LoRA.
    """

    objective: Objective | Switch
    learning_rate: jax.Array | float
    weight_decay: jax.Array | float
    max_grad_norm: jax.Array | float
    temperature: jax.Array | float
    router_aux_coef: jax.Array | float | None
    objective_schedule: Schedule | None
    lora_scale: jax.Array | float | None
    static: Static = struct.field(pytree_node=False)

    def __init__(
        self, objective, learning_rate, weight_decay, max_grad_norm, temperature, model=None,
        *, router_aux_coef=None, objective_schedule=None, lora_scale=None, static=None, **shape,
    ):  # fmt: skip
        shape |= {} if model is None else {"model": model}
        vars(self).update(  # frozen: attributes cannot be assigned
            objective=objective,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            temperature=temperature,
            router_aux_coef=router_aux_coef,
            objective_schedule=objective_schedule,
            lora_scale=lora_scale,
            static=dataclasses.replace(static, **shape) if static else Static(**shape),
        )

    def at(self, iteration: jax.Array) -> Hyperparameters:
        """Those of an iteration (from 0): with the objective as it is by its schedule."""
        if self.objective_schedule is None:
            return self
        return self.replace(objective=self.objective_schedule.at(self.objective, iteration))


def learning_rate(hp: Hyperparameters, update: jax.Array) -> jax.Array:
    """The learning rate of an update (from 0): linear warm-up to the peak, then the schedule."""
    warmup = hp.static.warmup
    rest = max(1, hp.static.total - warmup)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
    }[hp.static.schedule]
    warm = optax.linear_schedule(1 / max(1, warmup), 1.0, max(1, warmup - 1))
    factor = optax.join_schedules([warm, after], [warmup])(update)
    return jnp.float32(hp.learning_rate) * factor


def optimizer(hp: Hyperparameters, rate: jax.Array) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind clipping by global norm; its state depends on no setting."""
    static = hp.static
    table = lora.trained(model.params.table(static.model), static.model)
    decays = jax.tree.map(lambda spec: spec.fan_in > 0, table)
    return optax.chain(
        optax.clip_by_global_norm(hp.max_grad_norm),
        optax.scale_by_adam(static.b1, static.b2, static.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(hp.weight_decay, decays),
        optax.scale(-rate),
    )


@jax.jit
def init(params: Any, hp: Hyperparameters) -> TrainState:
    """The state before the first iteration; with LoRA, ``params`` are the adapters.

    Raises:
      ValueError: parameters in less than 32 bits, whose rounding loses most steps.
    """
    for path, x in jax.tree.leaves_with_path(params):
        if jnp.finfo(x.dtype).bits < 32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"params/{name} in {x.dtype}: must be float32 to be learnt; set the model's "
                "compute_dtype for matmuls in bfloat16"
            )
    zero = jnp.int32(0)
    opt_state = optimizer(hp, learning_rate(hp, zero)).init(params)
    state = TrainState(zero, zero, params, opt_state)
    return sharding.constrain(state, hp.static.mesh, partition_specs(hp))


def partition_specs(hp: Hyperparameters) -> TrainState:
    """Where the state lies: the optimizer's moments where their parameters do."""
    config, whole, step = hp.static.model, PartitionSpec(), optimizer(hp, jnp.float32(0))
    params = lora.trained(model.params.partition_specs(config), config)
    opt_state = jax.eval_shape(step.init, lora.trained(model.params.abstract(config), config))
    placed = optax.tree_map_params(
        step, lambda _, spec: spec, opt_state, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, whole, params, placed)


def abstract(hp: Hyperparameters) -> TrainState:
    """Shapes, dtypes and, on a mesh, shardings of the state."""
    config = hp.static.model
    state = jax.eval_shape(init, lora.trained(model.params.abstract(config), config), hp)
    return _placed(state, hp.static.mesh, partition_specs(hp))


def abstract_frozen(hp: Hyperparameters) -> Frozen | None:
    """The same of what updates leave as it is; None where that is nothing."""
    config = hp.static.model
    specs = lora.frozen(model.params.partition_specs(config), config)
    return _placed(lora.frozen(model.params.abstract(config), config), hp.static.mesh, specs)


def _placed(tree: Any, mesh: Mesh | None, specs: Any) -> Any:
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree, sharding.shardings(mesh, specs),
    )  # fmt: skip
