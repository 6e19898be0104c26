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
from jax.sharding import Mesh, PartitionSpec

from sapo_jax import learner, objectives
from sapo_jax.model import params
from sapo_jax.model.config import ModelConfig
from sapo_jax.objectives import Objective
from sapo_jax.objectives.gates import TokenInputs
from sapo_jax.parallel import collectives, sharding
from sapo_jax.types import Batch

SKETCH = 8191  # a prime; inner products of sketches err by 1/√8191 = 1% of the norms
HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class Pulled:
    """Gradients of K cotangents over M blocks of rows."""

    grads: Any  # tree of f32[K, ...], summed over the blocks
    squares: jax.Array  # f32[M, K], squared norms of each block's gradient
    sketches: jax.Array  # f32[M, K, D], linear maps of each block's gradient


def _bare(x: TokenInputs, hp: dict) -> jax.Array:
    """sg(r)·A·log π_θ: c = r at any ratio level, where r·A of a product has |y| times as much."""
    return jax.lax.stop_gradient(x.ratio) * x.advantages * x.logp


def ungated(objective: Objective) -> Objective:
    """The same ratio level and aggregation with the bare ratio in the gate's place: c = r."""
    level = {"geo_clipped": "sequence"}.get(objective.ratio, objective.ratio)
    hyperparameters = {**objective.hyperparameters, "kl_coef": 0.0}
    return dataclasses.replace(objective, gate=_bare, ratio=level, hyperparameters=hyperparameters)


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
            return objectives.finish(terms)[0]

        return jax.grad(loss)(logp_BS)

    return jnp.stack([of(objective) for objective in algorithms])


def blocks_of(tree: Any, count: int, axis: int = 0) -> Any:
    """Split rows into blocks: their axis becomes two, of which that of blocks goes to the front.

    Raises:
      ValueError: packed rows, whose groups are not in order.
    """
    if isinstance(tree, Batch) and tree.count is not None:
        raise ValueError("batch.pack=True: must be False, for rows to be taken in blocks")

    def blocks(x):
        shape = (*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    return jax.tree.map(blocks, tree)


@partial(jax.jit, static_argnames="width")
def pull(
    weights: Any,
    blocks: Batch,
    cotangents_MKRS: jax.Array,
    hp: learner.Hyperparameters,
    width: int = SKETCH,
) -> Pulled:
    """Pull K cotangents back to the parameters: Σ_t u_t ∇log π_t, one forward for all of them.

    On a mesh the rows of each block are split, filled up with copies whose cotangents are 0.

    Args:
      weights: the policy θ at which gradients are taken.
      blocks: rows in M blocks, [M, R, ...]; one block's activations exist at a time.
      cotangents_MKRS: f32[M, K, R, S], ∂loss/∂log π.
      hp: the model, its temperature, how the forward pass is done, and the mesh.
      width: of the sketches.
    """
    # With a random sign for each parameter, sums over bins keep inner products on average.
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    signs = treedef.unflatten([jax.random.rademacher(k, x.shape, jnp.int8) for k, x in pairs])
    missing = -cotangents_MKRS.shape[2] % sharding.parts(hp.static.mesh)
    blocks = jax.tree.map(lambda x: _pad(x, 1, missing, "edge"), blocks)
    where, whole = params.partition_specs(hp.static.model), PartitionSpec()
    rows, of_each = sharding.spec(None, "rows"), sharding.spec(None, None, "rows")
    function = sharding.shard_map(
        partial(_pull, width=width),
        hp.static.mesh,
        (where, where, rows, of_each, whole),
        Pulled(_grad_specs(hp.static.model), whole, whole),
    )
    signs = sharding.constrain(signs, hp.static.mesh, where)
    return function(weights, signs, blocks, _pad(cotangents_MKRS, 2, missing), hp)


def _pad(x: jax.Array, axis: int, missing: int, mode: str = "constant") -> jax.Array:
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode) if missing else x


def _grad_specs(config: ModelConfig) -> Any:
    """Where K gradients lie on a mesh."""
    return jax.tree.map(lambda spec: PartitionSpec(None, *spec), params.partition_specs(config))


def _pull(weights, signs, blocks, cotangents_MKRS, hp, width) -> Pulled:
    specs = jax.tree.leaves(params.partition_specs(hp.static.model))

    def visit(total, block_and_cotangents):
        block, cotangents_KRS = block_and_cotangents
        _, pullback = jax.vjp(lambda w: learner.forward(w, block, hp)[0], weights)

        # One at a time: beside the K sums there is one gradient, and one sketch of each parameter.
        def add(total, k_and_cotangent):
            k, cotangent_RS = k_and_cotangent
            grads = params.psum_gradients(pullback(cotangent_RS)[0], hp.static.model)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            total = jax.tree.map(lambda t, g: t.at[k].add(g), total, grads)
            each = zip(jax.tree.leaves(grads), jax.tree.leaves(signs), specs, strict=True)
            parts = [(jnp.sum(g * g), _sketch(g * sign, spec, width)) for g, sign, spec in each]
            return total, _psum(parts, specs)

        return jax.lax.scan(add, total, (jnp.arange(count), cotangents_KRS))

    count = cotangents_MKRS.shape[1]
    zeros = jax.tree.map(lambda w: jnp.zeros((count, *w.shape), jnp.float32), weights)
    grads, (squares, sketches) = jax.lax.scan(visit, zeros, (blocks, cotangents_MKRS))
    return Pulled(grads, squares, sketches)


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that split a parameter."""
    return tuple(sorted(axis for axis in spec if axis))


def _psum(values: list[Any], specs: list[PartitionSpec]) -> Any:
    """The sum over all parameters of what each device computed of its part of each."""
    by_axes: dict[tuple[str, ...], Any] = {}
    for value, axes in zip(values, map(_axes, specs), strict=True):
        known = by_axes.get(axes)
        by_axes[axes] = value if known is None else jax.tree.map(jnp.add, known, value)
    wholes = [collectives.psum(value, axes) for axes, value in by_axes.items()]
    return jax.tree.map(lambda *x: sum(x), *wholes)


def _sketch(signed: jax.Array, spec: PartitionSpec, width: int) -> jax.Array:
    """What this device's part adds to the sketch of a parameter's gradient, f32[width].

    An entry's bin follows from its place in the whole layer: a mesh changes nothing. Each part is
    put into zeros of the size of a layer, one layer at a time.
    """
    if spec[0]:  # not stacked over layers
        signed, spec = signed[None], PartitionSpec(None, *spec)
    is_split = any(collectives.axis_size(axis) > 1 for axis in _axes(spec))

    def fold(x):
        for dimension, axis in enumerate(spec[1:]):
            if axis and collectives.axis_size(axis) > 1:
                part, shape = x.shape[dimension], list(x.shape)
                shape[dimension] *= collectives.axis_size(axis)
                start = collectives.axis_index(axis) * part
                x = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(shape), x, start, dimension)
        return jnp.pad(x.reshape(-1), (0, -x.size % width)).reshape(-1, width).sum(0)

    return (jax.lax.map(fold, signed) if is_split else jax.vmap(fold)(signed)).sum(0)


def _kind(name: str) -> str:
    if name.startswith("experts"):
        return "experts"
    kinds = dict.fromkeys(("gate", "up", "down", "mlp_norm"), "mlp") | {"router": "router"}
    return kinds.get(name, "attention")


@partial(jax.jit, static_argnames=("config", "mesh"))
def gram(
    left: Any, right: Any, config: ModelConfig, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """Inner products of K and K' gradients, f32[K, K'], by part of the model.

    Parts: ``whole``; ``layer 0`` and so on; ``embedding`` (with head and last norm), ``attention``,
    ``mlp`` (both with their norms), ``router``, ``experts``.
    """
    specs = _grad_specs(config)
    function = sharding.shard_map(
        partial(_gram, config=config), mesh, (specs, specs), PartitionSpec()
    )
    return function(left, right)


def _gram(left: Any, right: Any, config: ModelConfig) -> dict[str, jax.Array]:
    def dots(x, y, spec):
        x, y = (z.reshape(*z.shape[:2], -1) for z in (x, y))
        each = jnp.einsum("klx,jlx->lkj", x, y, precision=HIGHEST)
        return collectives.psum(each, _axes(spec))

    def add(part, value):
        parts[part] = parts.get(part, 0) + value

    parts: dict[str, jax.Array] = {}
    table, specs = params.table(config)["layers"], params.partition_specs(config)
    for name in left["layers"]:
        each_LKJ = dots(left["layers"][name], right["layers"][name], specs["layers"][name])
        add(_kind(name), each_LKJ.sum(0))
        for place, layer in enumerate(table[name].layers):
            add(f"layer {layer}", each_LKJ[place])
    for name in sorted(set(left) - {"layers"}):
        add("embedding", dots(left[name][:, None], right[name][:, None], specs[name])[0])
    kinds = [part for part in parts if not part.startswith("layer")]
    return {"whole": sum(parts[part] for part in kinds), **parts}
