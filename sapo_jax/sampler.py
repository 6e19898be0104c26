"""Rollouts: prefill once per prompt, decode groups in slots on the device, refill, shrink.

Decoding runs on the device (see `decoding`). The host takes part only between segments of its loop:
to refill slots whose group has finished, to drop empty ones when no prompt waits, and to let the
cache grow to its next size. What it decides follows from replicated values alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import numpy as np

from sapo_jax import assembly, decoding, sampling, sharding
from sapo_jax.decoding import Decoding
from sapo_jax.handover import moved_bytes, to_sampler
from sapo_jax.model.config import ModelConfig
from sapo_jax.types import Prompts, Rollout

__all__ = ["Plan", "check", "make_plan", "moved_bytes", "rollout", "to_sampler"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes that a rollout's programs are compiled for.

    Attributes:
      slots: numbers of groups in flight, descending: the first while prompts wait, the others
        when the last ones finish.
      cache: completion cache sizes, ascending, the last one max_new_tokens.
      refill: prompts prefilled at a time.

    On a mesh the slots and the refill are those of all parts of the rows together.
    """

    slots: tuple[int, ...]
    cache: tuple[int, ...]
    refill: int


def make_plan(
    prompts: int, max_new_tokens: int, *, slots: int = 0, shrink: int = 2, parts: int = 1
) -> Plan:
    """A plan for a batch of prompts.

    Args:
      prompts: P.
      max_new_tokens: the longest completion.
      slots: groups in flight; 0 takes all prompts at once.
      shrink: how many times the number of slots is halved while the last groups finish.
      parts: of the rows (see `sharding.parts`), each with as many slots; divides P and the slots.
    """
    slots = min(slots or prompts, prompts)
    levels = [parts * max(1, slots // parts >> i) for i in range(shrink + 1)]
    sizes = [max_new_tokens]
    while sizes[-1] > 32 and len(sizes) < 4:
        sizes.append(-(-sizes[-1] // 2))
    refill = slots if slots == prompts else parts * max(1, slots // parts // 4)
    return Plan(tuple(dict.fromkeys(levels)), tuple(reversed(sizes)), refill)


def check(
    prompts: Prompts,
    config: ModelConfig,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    domain: str,
    truncate: bool,
) -> None:
    """Refuse what cannot be sampled, before anything is compiled.

    Raises:
      ValueError: naming the argument, its value and what is allowed.
    """
    chex.assert_rank(prompts.tokens, 2)
    chex.assert_shape([prompts.length, prompts.id], prompts.tokens.shape[:1])
    width = prompts.tokens.shape[1]
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"{group_size=}, {max_new_tokens=}: must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"{temperature=}: must be ≥ 0 (0 is greedy)")
    if truncate and domain == "train":
        raise ValueError(
            "top_k and top_p are for evaluation: in the domain 'train' the sampler must draw from "
            "the distribution whose log-probabilities the learner computes"
        )
    if width + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompts of {width} tokens and {max_new_tokens=} exceed the model's context, "
            f"max_position_embeddings={config.max_position_embeddings}"
        )


def rollout(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    iteration: int,
    domain: str = "train",
    top_k: int | None = None,
    top_p: float | None = None,
    plan: Plan | None = None,
    warm_up: Callable[[str], None] | None = None,
) -> Rollout:
    """Sample G completions of each prompt.

    Args:
      params: the learner's parameters, or those of `to_sampler`; on a mesh, so is the rollout.
      config: the model's shape; names the stop tokens.
      prompts: P prompts; the same prompt draws the same noise wherever it stands.
      group_size: G.
      max_new_tokens: completions end here, or with the first stop token.
      temperature: divides the logits; 0 is greedy.
      seed: of the noise, with iteration and domain: different domains never share noise.
      iteration: of the policy, recorded in the rows.
      domain: what the samples are for; "train" or a name of yours.
      top_k: keep the k likeliest tokens; for evaluation only, since the learner's log π is that of
        the whole softmax.
      top_p: keep the smallest set of tokens of at least this probability; for evaluation only.
      plan: shapes to compile for; by default all prompts at once.
      warm_up: compile every program of the plan instead of sampling, and call this with a line
        about each; the result is a rollout without completions.

    Returns:
      Rollout of B = P·G rows of S = N + max_new_tokens tokens, those of one prompt adjacent.

    Raises:
      ValueError: an argument out of its domain.
    """
    truncate = top_k is not None or top_p is not None
    check(
        prompts,
        config,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        domain=domain,
        truncate=truncate,
    )
    p, width = prompts.tokens.shape
    mesh = sharding.mesh_of(params)
    parts = sharding.parts(mesh)
    if mesh is not None:
        sharding.check(mesh, [sharding.Dimension("prompts", "rows", p)])
    plan = plan or make_plan(p, max_new_tokens, parts=parts)
    divided = all(n % parts == 0 for n in (*plan.slots, plan.refill))
    if plan.cache[-1] != max_new_tokens or plan.slots[0] > p or not divided:
        raise ValueError(f"{plan} is not for {p} prompts in {parts} parts and {max_new_tokens=}")
    prompts = sharding.feed(prompts, mesh)
    controls = sampling.controls(temperature, top_k, top_p)
    weights = to_sampler(params, config)
    base = decoding.base_key(np.uint32(seed), domain, np.int32(iteration))
    static = {"truncate": truncate, "mesh": mesh}
    prefill = partial(decoding.prefill, weights, config, prompts, base, controls, **static)
    decode = partial(decoding.decode, weights, config, controls, **static)
    state = decoding.empty(
        config, plan.slots[0], plan.cache[0], p, width, group_size, max_new_tokens, mesh
    )
    # Arrays of NumPy have no place.
    if mesh is None and getattr(weights["final_norm"], "committed", False):
        # Programs are compiled apart for placed and unplaced arguments: place them from the start.
        state = jax.device_put(state, weights["final_norm"].sharding)
    if warm_up:
        state = _compile_all(plan, state, p, mesh, prefill, decode, warm_up)
    else:
        state = _run(plan, state, p, mesh, prefill, decode)
    results = (state.tokens, state.logp, state.count, state.finished)
    return assembly.assemble(config, results, prompts, np.int32(iteration), state.routing, mesh)


def _run(plan: Plan, state: Decoding, total: int, mesh, prefill, decode) -> Decoding:
    """The host's part: refill, shrink, grow, and decode until all prompts are done.

    Arrays over the n parts of the rows; each has as many prompts, in slots of its own.
    """
    parts = sharding.parts(mesh)
    refill, total = plan.refill // parts, total // parts
    slots = [count // parts for count in plan.slots]
    level = size = clock = 0
    waiting_n, idle_nQ = np.zeros(parts, int), np.ones((parts, slots[0]), bool)
    while True:
        while (count_n := _fillable(idle_nQ, total - waiting_n, refill)).any():
            filled = _fill(plan, parts, total, idle_nQ, waiting_n, count_n)
            state = prefill(state, *(sharding.feed(x, mesh) for x in filled))
        if idle_nQ.all():
            return state
        done = bool((waiting_n == total).all())
        while done and level + 1 < len(slots) and (~idle_nQ).sum(-1).max() <= slots[level + 1]:
            level += 1
            order_nQ = np.argsort(idle_nQ, axis=-1, kind="stable")[:, : slots[level]]
            order = sharding.feed(order_nQ.astype(np.int32).ravel(), mesh)
            state = decoding.take(state, order, mesh)
            idle_nQ = np.take_along_axis(idle_nQ, order_nQ, -1)
        if clock >= plan.cache[size] and size + 1 < len(plan.cache):
            size += 1
            state = state.replace(own_kv=decoding.grow(state.own_kv, plan.cache[size], mesh))
        grows = size + 1 < len(plan.cache)
        until = plan.cache[size] if grows else np.iinfo(np.int32).max
        # While prompts wait, a part that can take one ends the decoding; then, all that can shrink.
        enough_n = np.where(waiting_n < total, refill, slots[level] + 1)
        if done:
            enough_n = np.full(parts, slots[level] - [*slots[level + 1 :], 0][0])
        enough = sharding.feed(enough_n.astype(np.int32), mesh)
        state, idle = decode(state, np.int32(until), enough, np.int32(parts if done else 1))
        clock, idle = jax.device_get((state.clock, idle))
        idle_nQ = np.array(idle).reshape(parts, -1)


def _fillable(idle_nQ: np.ndarray, rest_n: np.ndarray, refill: int) -> np.ndarray:
    """How many slots of each part to fill: none before a whole refill fits, or all are idle."""
    free_n = idle_nQ.sum(-1)
    ready_n = (free_n >= refill) | idle_nQ.all(-1)
    return np.where(ready_n, np.minimum(np.minimum(refill, rest_n), free_n), 0)


def _fill(plan: Plan, parts: int, total: int, idle_nQ, waiting_n, count_n):
    """Slots and prompts of one refill, i32[n·F], each named by its place in its part of the rows.

    Takes the slots, and the prompts from those that wait. Entries that fill nothing name a slot out
    of range.
    """
    refill = plan.refill // parts
    slot_nF = np.full((parts, refill), plan.slots[0] // parts, np.int32)
    prompt_nF = np.full((parts, refill), total, np.int32)
    for i, count in enumerate(count_n):
        slot_nF[i, :count] = np.flatnonzero(idle_nQ[i])[:count]
        prompt_nF[i, :count] = waiting_n[i] + np.arange(count)
        idle_nQ[i, slot_nF[i, :count]] = False
        waiting_n[i] += count
    return slot_nF.ravel(), prompt_nF.ravel()


def _compile_all(
    plan: Plan, state: Decoding, total: int, mesh, prefill, decode, report
) -> Decoding:
    """Run every program once on empty slots: it compiles, and there is nothing to compute."""
    zero, parts = np.int32(0), sharding.parts(mesh)
    zeros = sharding.feed(np.zeros(parts, np.int32), mesh)

    def keep(level):
        order = np.tile(np.arange(plan.slots[level] // parts, dtype=np.int32), parts)
        return decoding.take(state, sharding.feed(order, mesh), mesh)

    report(f"prefill of {plan.refill} prompts")
    none, idle = np.zeros(parts, int), np.ones((parts, plan.slots[0] // parts), bool)
    nothing = _fill(plan, parts, total // parts, idle, none, none)
    state = prefill(state, *(sharding.feed(x, mesh) for x in nothing))
    for level, slots in enumerate(plan.slots):
        last = level + 1 == len(plan.slots)
        smaller = None if last else keep(level + 1)
        for i, size in enumerate(plan.cache):
            report(f"decoding of {slots} groups with {size} tokens of cache")
            if i:
                state = state.replace(own_kv=decoding.grow(state.own_kv, size, mesh))
            if not last:
                keep(level + 1)
            state, _ = decode(state, zero, zeros, zero)
        state = state if last else smaller
    return state
