"""The decoder as pure functions; one definition of a layer for learner and sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.model import attention, blocked, lora, moe, segments, splash, vision, vocab
from sapo_jax.model.attention import einsum
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.moe import Routing
from sapo_jax.model.params import all_gather, head_weight, layer_stacks, layer_table
from sapo_jax.model.swiglu import swiglu
from sapo_jax.parallel import collectives
from sapo_jax.types import Images


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, computed in f32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def _biased(w: dict[str, jax.Array], name: str, out: jax.Array) -> jax.Array:
    return out + w[name + "_bias"] if name + "_bias" in w else out


def _project(w: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    return _biased(w, name, lora.linear(w, name, x))


def layer(
    weights: dict[str, jax.Array],
    config: ModelConfig,
    x_XD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: Callable,
    replay_Xk: jax.Array | None = None,
) -> tuple[jax.Array, Routing | None]:
    """One pre-norm layer: grouped-query attention, then SwiGLU or a mixture of them.

    Args:
      weights: one layer of the parameter table; which parts the layer has follows from it.
      config: the model's shape.
      x_XD: the residual stream, any leading axes.
      rope: from `attention.rotary`, at the positions of x.
      attend: (q, k, v) [..., heads, d] → [..., H, d]; the only part that differs between the
        learner, prefill and decoding.
      replay_Xk: experts to use, see `moe.route`.

    Returns:
      The stream after the layer, and what the router decided where there is one.
    """
    dtype, eps = jnp.dtype(config.compute_dtype), config.rms_norm_eps
    w = {n: value.astype(dtype) for n, value in lora.copy_to_tensor(weights).items()}
    h = collectives.copy_to_tensor(rms_norm(x_XD, weights["attn_norm"], eps))
    q, k, v = (_project(w, name, h) for name in ("q", "k", "v"))
    if "q_norm" in weights:
        scales = (collectives.copy_to_tensor(weights[name]) for name in ("q_norm", "k_norm"))
        q, k = (rms_norm(y, scale, eps) for y, scale in zip((q, k), scales, strict=True))
    q, k = attention.rotate(q, rope), attention.rotate(k, rope)
    out = lora.linear(w, "o", attend(q, k, v), 2)
    x_XD = x_XD + _biased(w, "o", collectives.reduce_from_tensor(out))
    h = rms_norm(x_XD, weights["mlp_norm"], eps)
    if "router" in weights:
        routing = moe.route(h, weights["router"], config, replay_Xk)
        return x_XD + moe.experts(w, config, h, routing), routing
    h = collectives.copy_to_tensor(h)
    inner = swiglu(lora.linear(w, "gate", h), lora.linear(w, "up", h))
    return x_XD + collectives.reduce_from_tensor(lora.linear(w, "down", inner)), None


def embed(params: Any, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Token embeddings in the compute dtype."""
    return vocab.embed(params["embed"].astype(config.compute_dtype), tokens)


def recomputed(step: Callable, remat: bool) -> Callable:
    """The step of the scan over layers, with what the backward pass computes again.

    With ``remat`` that is all but what flash attention saves, which costs more to compute than to
    store. On GPU, and with `fsdp`, it is at least what is neither that nor a matmul's result: the
    rest takes less time to compute than memory to hold, and parameters' parts of other devices, or
    what follows from them (a reshaped form, say), would add up to a whole model.
    """
    policies = jax.checkpoint_policies
    attention_alone = policies.save_only_these_names(splash.SAVED)
    if remat:
        return jax.checkpoint(step, policy=attention_alone)
    if collectives.axis_size("fsdp") > 1 or collectives.platform() == "gpu":
        dots = policies.save_from_both_policies(policies.checkpoint_dots, attention_alone)
        return jax.checkpoint(step, policy=dots)
    return step


UNROLLED = 8  # layers, at most, that a CPU's program holds one by one


def visit(step: Callable, x: Any, xs: Any, config: ModelConfig) -> tuple[Any, Any]:
    """`jax.lax.scan`, or on a CPU the steps one by one where the model has few layers.

    There, stacking what the backward pass needs costs a fifth of an update. Experts stay in the
    scan: one by one, XLA rounds them otherwise with a gradient than without, and a first update
    that replays the old policy's routing would not be on-policy to the bit.
    """
    scanned = config.num_hidden_layers > UNROLLED or config.num_experts > 0
    if collectives.platform() != "cpu" or scanned:
        return jax.lax.scan(step, x, xs)
    # Unstacked, not indexed: the gradient is then one concatenation, not a sum of padded parts.
    each, outs = zip(*map(jnp.unstack, jax.tree.leaves(xs)), strict=True), []
    for leaves in each:
        x, out = step(x, jax.tree.unflatten(jax.tree.structure(xs), leaves))
        outs.append(out)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *outs)


def hidden(
    params: Any,
    config: ModelConfig,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    *,
    remat: bool = False,
    block: int = blocked.BLOCK,
    prefix_BS: jax.Array | None = None,
    replay_BSLk: jax.Array | None = None,
    sight: vision.Sight | None = None,
    summarise: Callable[[Routing], Any] = lambda routing: routing.experts,
) -> tuple[jax.Array, Any]:
    """Final hidden states, and what ``summarise`` makes of each sparse layer's routing.

    Args:
      params: the parameters; those of layers are scanned over.
      config: the model's shape.
      tokens_BS: i32[B, S].
      segments_BS: i32[B, S], 0 at pads; entry s sees the tokens of its segment up to s.
      prefix_BS: i32[B, S], the segment that it sees as well, see `segments`; None for none.
      block: tokens of a block of attention, see `blocked.block_size`.
      remat: the backward pass recomputes each layer from its input.
      replay_BSLk: experts to use in each sparse layer, −1 for the router's choice.
      sight: what placeholders stand for, and positions; None for text alone.
      summarise: applied within the scan, so that what it drops is never stacked.

    Returns:
      (f[B, S, D], tree of [L_moe, ...] or None for a dense model).
    """
    if sight is None:
        rope = attention.rotary(segments.positions(segments_BS, prefix_BS), config)
    else:
        rope = vision.rotary(sight.positions, config)
    specs = layer_table(config)
    replay = None if replay_BSLk is None else jnp.moveaxis(replay_BSLk, 2, 0)

    def attend(q, k, v):
        return attention.causal(q, k, v, segments_BS, config.attention, prefix_BS, block)

    def period(places):  # one step visits the layers of one period
        def step(x_BSD, inputs):
            stacked, replayed, numbers = inputs
            summaries = []
            for n, place in enumerate(places):
                w = {name: stacked[name][at] for name, at in place.items()}
                w = all_gather(w, specs, config)
                replays = "router" in place and replayed is not None
                experts = replayed[place["router"]] if replays else None
                x_BSD, routing = layer(w, config, x_BSD, rope, attend, experts)
                x_BSD = x_BSD if sight is None else sight.add(x_BSD, numbers[n])
                if routing is not None:
                    summaries.append(summarise(routing))
            return x_BSD, jax.tree.map(lambda *x: jnp.stack(x), *summaries) if summaries else None

        return step

    x_BSD, collected = embed(params, config, tokens_BS), []
    x_BSD = x_BSD if sight is None else sight.embed(x_BSD)
    for stack in layer_stacks(config):
        places = stack.places(specs)
        # A dict and not a set: the order of the names is that of the program's operations.
        names = dict.fromkeys(name for place in places for name in place)
        stacked = {n: stack.part(params["layers"][n], specs[n].layers) for n in names}
        has_replay = "router" in names and replay is not None
        replayed = stack.part(replay, config.sparse_layers) if has_replay else None
        numbers = None
        if sight is not None:
            numbers = np.array(stack.layers, np.int32).reshape(stack.repeats, stack.period)
        step = recomputed(period(places), remat)
        x_BSD, summaries = visit(step, x_BSD, (stacked, replayed, numbers), config)
        if summaries is not None:
            collected.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), summaries))
    routing = jax.tree.map(lambda *x: jnp.concatenate(x), *collected) if collected else None
    return rms_norm(x_BSD, params["final_norm"], config.rms_norm_eps), routing


def logits_of(params: Any, config: ModelConfig, hidden_XD: jax.Array) -> jax.Array:
    """Logits f32[..., V] of final hidden states."""
    weight_VD = head_weight(params).astype(config.compute_dtype)
    return einsum("...D,VD->...V", hidden_XD, weight_VD, out=jnp.float32)


def logits(
    params: Any, config: ModelConfig, tokens_BS: jax.Array, images: Images | None = None
) -> jax.Array:
    """Causal logits f32[B, S, V] of left-aligned rows; for tests and inspection.

    Training never forms this array: see `head`. ``images`` are all that the rows have placeholders
    for, row by row, see `vision.process`.
    """
    segments_BS = jnp.ones_like(tokens_BS)
    sight = None if images is None else vision.look(params, config, tokens_BS, images)
    hidden_BSD, _ = hidden(params, config, tokens_BS, segments_BS, sight=sight)
    return logits_of(params, config, hidden_BSD)
