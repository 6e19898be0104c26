"""log π of a minibatch on each device's rows, micro-batch by micro-batch, and scoring by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sapo_jax import model
from sapo_jax.learner import images
from sapo_jax.learner.optimizer import Hyperparameters
from sapo_jax.model import head, lora, routing, segments, transformer, vision
from sapo_jax.parallel import sharding
from sapo_jax.types import Batch, Frozen, add, zero


class MicroBatches(NamedTuple):
    """A device's rows in parts.

    Attributes:
      count: those in use, a number or i32[].
      at: one of them, from its index.
    """

    count: int | jax.Array
    at: Callable[[Any], Batch]


def head_arguments(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[tuple, routing.Summary | None]:
    """The arguments of `head`'s functions, and what the routers did (None in a dense model)."""
    static, config, replay = hp.static, hp.static.model, None
    if static.routing_replay != "none" and config.num_experts:
        if batch.routing is None:
            raise ValueError(f"routing_replay={static.routing_replay!r}: the batch has no routing")
        replay = batch.routing
    params = model.params.all_gather(params, model.params.table(config), config)
    layout = batch.prompt, batch.segments, batch.prefix
    sight = vision.see(batch.images, config, batch.tokens, *layout)
    hidden_BSD, summary = transformer.hidden(
        params, config, batch.tokens, batch.segments, remat=static.remat, block=static.block,
        prefix_BS=batch.prefix, replay_BSLk=replay, sight=sight,
        summarise=lambda r: routing.summarise(r, counts(batch), config),
    )  # fmt: skip
    rows, width = batch.tokens.shape
    before_BS = segments.predecessors(batch.segments, batch.prefix)
    source_BS = before_BS + width * jnp.arange(rows, dtype=jnp.int32)[:, None]
    mask_BS = batch.mask.at[:, 0].set(False)  # nothing predicts a row's first token
    tokens = head.Tokens(*(x.reshape(-1) for x in (batch.tokens, source_BS, mask_BS)))
    weight_VD = model.params.head_weight(params)
    hidden_XD = hidden_BSD.reshape(-1, config.hidden_size)
    return (hidden_XD, weight_VD, tokens, jnp.float32(hp.temperature), static.head_chunk), summary


def counts(batch: Batch) -> jax.Array:
    """Sequences that each token stands for, f32[B, S]."""
    return segments.multiplicity(batch.segments, batch.prefix)


def forward(
    params: Any, batch: Batch, hp: Hyperparameters
) -> tuple[jax.Array, jax.Array, routing.Summary | None]:
    """log π and entropy of the tokens under the mask, and what the routers did.

    Returns:
      (f32[B, S], f32[B, S], summary): 0 outside the mask; no summary of a dense model.
    """
    arguments, summary = head_arguments(params, batch, hp)
    logp_T, entropy_T = head.logp_entropy(*arguments)
    shape = batch.tokens.shape
    return logp_T.reshape(shape), entropy_T.reshape(shape), summary


def shard_map(function: Callable, hp: Hyperparameters, out_specs: Any) -> Callable:
    """(params, batch, hp, frozen) → …, for each device's rows and part of the parameters."""
    config, specs = hp.static.model, model.params.partition_specs(hp.static.model)
    own, base = lora.trained(specs, config), lora.frozen(specs, config) or PartitionSpec()
    in_specs = (own, sharding.spec("rows"), PartitionSpec(), base)
    return sharding.shard_map(function, hp.static.mesh, in_specs, out_specs)


def micro_batches(batch: Batch, hp: Hyperparameters) -> MicroBatches:
    """The rows as `update` and `score` visit them; each part has what is seen of all images."""
    m, count, seen = hp.static.micro_batches, batch.count, batch.images
    rows = batch.replace(count=None, images=None)
    split = jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), rows)
    number = m if count is None else count[0]

    def at(i):
        return jax.tree.map(lambda x: x[i], split).replace(images=seen)

    return MicroBatches(number, at)


def total(function: Callable[[Batch], Any], micros: MicroBatches) -> Any:
    """The sum over micro-batches of arrays and mergeable reductions."""
    count, at = micros
    if isinstance(count, int) and count == 1:
        return function(at(0))
    start = zero(jax.eval_shape(lambda: function(at(0))))
    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(0, count, lambda i, total: add(function(at(i)), total), start)


def map_rows(
    function: Callable, params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None = None
) -> Any:
    """``function(policy, micro-batch, hp)`` of the rows of each device; results are [B, ...].

    Those of micro-batches that are not in use are 0.
    """

    def local(params, batch, hp, frozen):
        params = lora.join(params, frozen, hp.lora_scale)
        batch = batch.replace(images=images.look(params, hp.static.model, batch))
        count, at = micro_batches(batch, hp)
        shapes = jax.eval_shape(lambda: function(params, at(0), hp))
        start = jax.tree.map(
            lambda x: jnp.zeros((hp.static.micro_batches, *x.shape), x.dtype), shapes
        )

        def visit(i, out):
            found = function(params, at(i), hp)
            return jax.tree.map(lambda x, y: x.at[i].set(y), out, found)

        with jax.named_scope("micro_batches"):
            out = jax.lax.fori_loop(0, count, visit, start)
        return jax.tree.map(lambda x: x.reshape(batch.tokens.shape[0], *x.shape[2:]), out)

    batch = images.with_prompt(batch)
    return shard_map(local, hp, sharding.spec("rows"))(params, batch, hp, frozen)


@jax.jit
def score(
    params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None = None
) -> jax.Array:
    """log π of the tokens, f32[B, S], by the programs and micro-batches of `update`."""
    return map_rows(lambda *arguments: forward(*arguments)[0], params, batch, hp, frozen)


@jax.jit
def score_routing(
    params: Any, batch: Batch, hp: Hyperparameters, frozen: Frozen | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """`score` and the routing that an update replays with R2, by the routers' own choice."""

    def one(params, micro, hp):
        logp_BS, _, summary = forward(params, micro, hp)
        return logp_BS, summary and routing.recorded(summary, micro.segments)

    return map_rows(one, params, batch, hp.replace(routing_replay="none"), frozen)
