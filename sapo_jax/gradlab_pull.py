"""Gradients of many cotangents by one forward pass, and their inner products by part of the model.

The gradient of every objective is Jᵀu with the same J = ∂log π/∂θ and a cotangent u = ∂loss/∂log π
of its own.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sapo_jax import gates, learner, objectives
from sapo_jax.aggregations import finish
from sapo_jax.model import params
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective
from sapo_jax.types import Batch

SKETCH = 8191  # a prime; inner products of sketches err by 1/√8191 = 1% of the norms
HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class Pulled:
    """Gradients of K cotangents over M blocks of rows."""

    grads: Any  # tree of f32[K, ...], summed over the blocks
    squares: jax.Array  # f32[M, K], squared norms of each block's gradient
    sketches: jax.Array  # f32[M, K, D], linear maps of each block's gradient


def ungated(objective: Objective) -> Objective:
    """The same ratio level and aggregation with the bare ratio in the gate's place: f(r) = r."""
    level = {"geo_clipped": "sequence"}.get(objective.ratio, objective.ratio)
    hyperparameters = {**objective.hyperparameters, "kl_coef": 0.0}
    return dataclasses.replace(
        objective, gate=gates.importance, ratio=level, hyperparameters=hyperparameters
    )


@partial(jax.jit, static_argnames="kl")
def cotangents(
    algorithms: tuple[Objective, ...], logp_BS: jax.Array, batch: Batch, *, kl: str = "k3"
) -> jax.Array:
    """∂loss/∂log π of each objective at each token of the whole batch, f32[K, B, S]."""

    def of(objective):
        def loss(x_BS):
            terms = objectives.policy_terms(
                objective,
                x_BS,
                batch.old_logp,
                batch.advantages,
                batch.mask,
                ref_logp_BT=batch.ref_logp,
                kl=kl,
                weights_BT=batch.weights,
                segments_BT=batch.segments,
            )
            return finish(terms)[0]

        return jax.grad(loss)(logp_BS)

    return jnp.stack([of(objective) for objective in algorithms])


def blocks_of(tree: Any, count: int, axis: int = 0) -> Any:
    """Split rows into blocks: their axis becomes two, of which that of blocks goes to the front."""

    def split(x):
        shape = (*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return jax.tree.map(split, tree)


@partial(jax.jit, static_argnames="width")
def pull(
    weights: Any,
    blocks: Batch,
    cotangents_MKRS: jax.Array,
    hp: learner.Hyperparameters,
    width: int = SKETCH,
) -> Pulled:
    """Pull K cotangents back to the parameters: Σ_t u_t ∇log π_t, one forward for all of them.

    Args:
      weights: the policy θ at which gradients are taken.
      blocks: rows in M blocks, [M, R, ...]; one block's activations exist at a time.
      cotangents_MKRS: f32[M, K, R, S], ∂loss/∂log π.
      hp: the model, its temperature, and how the forward pass is done.
      width: of the sketches.
    """
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    signs = treedef.unflatten([jax.random.rademacher(k, x.shape, jnp.int8) for k, x in pairs])

    def sketch(x, sign):
        flat = (x * sign).reshape(-1)
        return jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width).sum(0)

    def visit(total, inputs):
        block, cotangents_KRS = inputs
        _, pullback = jax.vjp(lambda w: learner.forward(w, block, hp)[0], weights)

        def one(total, numbered):
            k, cotangent_RS = numbered
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), pullback(cotangent_RS)[0])
            total = jax.tree.map(lambda t, g: t.at[k].add(g), total, grads)
            square = sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))
            return total, (square, sum(jax.tree.leaves(jax.tree.map(sketch, grads, signs))))

        return jax.lax.scan(one, total, (jnp.arange(count), cotangents_KRS))

    count = cotangents_MKRS.shape[1]
    zeros = jax.tree.map(lambda w: jnp.zeros((count, *w.shape), jnp.float32), weights)
    grads, (squares, sketches) = jax.lax.scan(visit, zeros, (blocks, cotangents_MKRS))
    return Pulled(grads, squares, sketches)


def _kind(name: str) -> str:
    if name.startswith("experts"):
        return "experts"
    kinds = dict.fromkeys(("gate", "up", "down", "mlp_norm"), "mlp") | {"router": "router"}
    return kinds.get(name, "attention")


@partial(jax.jit, static_argnames="config")
def gram(left: Any, right: Any, config: ModelConfig) -> dict[str, jax.Array]:
    """Inner products of stacked gradients, f32[K, K'], by part of the model.

    Parts: ``whole``; ``layer 0`` and so on; ``embedding`` (with head and last norm), ``attention``,
    ``mlp`` (both with their norms), ``router``, ``experts``.
    """

    def dots(x, y):
        x, y = (z.reshape(*z.shape[:2], -1) for z in (x, y))
        return jnp.einsum("klx,jlx->lkj", x, y, precision=HIGHEST)

    def add(part, value):
        parts[part] = parts.get(part, 0) + value

    parts: dict[str, jax.Array] = {}
    specs = params.table(config)["layers"]
    for name in left["layers"]:
        each_LKJ = dots(left["layers"][name], right["layers"][name])
        add(_kind(name), each_LKJ.sum(0))
        for place, layer in enumerate(specs[name].layers):
            add(f"layer {layer}", each_LKJ[place])
    for name in set(left) - {"layers"}:
        add("embedding", dots(left[name][:, None], right[name][:, None])[0])
    kinds = [part for part in parts if not part.startswith("layer")]
    return {"whole": sum(parts[part] for part in kinds), **parts}
