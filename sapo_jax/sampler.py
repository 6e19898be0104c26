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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax import assembly, decoding, sampling, sharding
from sapo_jax.decoding import Decoding
from sapo_jax.handover import moved_bytes, to_sampler
from sapo_jax.model.config import ModelConfig
from sapo_jax.types import Prompts, Rollout

__all__ = ["Plan", "check", "ends", "make_plan", "moved_bytes", "rollout", "to_sampler"]


OnGroups = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
REPORTS = 8  # finished groups are reported in about this many parts


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
    on_groups: OnGroups | None = None,
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
      on_groups: called with the completions of some prompts as soon as they are finished, while the
        others are decoded: (index i32[g], tokens i32[g, G, T], count i32[g, G], finished
        i32[g, G]), NumPy arrays; each prompt comes once. With warm_up, all come at the end.
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
        if on_groups:
            every_nP = np.tile(np.arange(p // parts), (parts, 1))
            _report(on_groups, every_nP, p // parts, mesh, _completions(state, every_nP, mesh))
    else:
        state = _run(plan, state, p, mesh, prefill, decode, on_groups)
    results = (state.tokens, state.logp, state.count, state.finished)
    return assembly.assemble(config, results, prompts, np.int32(iteration), state.routing, mesh)


def _run(plan: Plan, state: Decoding, total: int, mesh, prefill, decode, on_groups) -> Decoding:
    """The host's part: refill, shrink, grow, and decode until all prompts are done.

    Arrays over the n parts of the rows; each has as many prompts, in slots of its own.
    """
    parts = sharding.parts(mesh)
    own, slots = total // parts, [count // parts for count in plan.slots]
    level = size = clock = 0
    waiting_n, idle_nQ = np.zeros(parts, int), np.ones((parts, slots[0]), bool)
    prompt_nQ = np.full(idle_nQ.shape, own)
    report = _nothing
    while True:
        while (count_n := _fillable(idle_nQ, own - waiting_n, plan.refill // parts)).any():
            slot_nF, prompt_nF = _fill(plan, parts, own, idle_nQ, waiting_n, count_n)
            arguments = (sharding.feed(x.ravel(), mesh) for x in (slot_nF, prompt_nF))
            state = prefill(state, *arguments)
            part, at = np.nonzero(slot_nF < slots[0])
            prompt_nQ[part, slot_nF[part, at]] = prompt_nF[part, at]
            idle_nQ[part, slot_nF[part, at]] = False
            waiting_n += count_n
        if idle_nQ.all():
            report()
            return state
        done = bool((waiting_n == own).all())
        while done and level + 1 < len(slots) and (~idle_nQ).sum(-1).max() <= slots[level + 1]:
            level += 1
            order_nQ = np.argsort(idle_nQ, axis=-1, kind="stable")[:, : slots[level]]
            order = sharding.feed(order_nQ.astype(np.int32).ravel(), mesh)
            state = decoding.take(state, order, mesh)
            idle_nQ, prompt_nQ = (np.take_along_axis(x, order_nQ, -1) for x in (idle_nQ, prompt_nQ))
        if clock >= plan.cache[size] and size + 1 < len(plan.cache):
            size += 1
            state = state.replace(own_kv=decoding.grow(state.own_kv, plan.cache[size], mesh))
        grows = size + 1 < len(plan.cache)
        until = plan.cache[size] if grows else np.iinfo(np.int32).max
        smaller = [*slots[level + 1 :], 0][0]
        need_n = np.where(waiting_n < own, plan.refill // parts, slots[level] + 1)
        need_n = np.full(parts, slots[level] - smaller) if done else need_n
        enough_n, quorum = _until(idle_nQ, need_n, (waiting_n < own).sum(), slots[0], on_groups)
        enough = sharding.feed(enough_n, mesh)
        state, idle = decode(state, np.int32(until), enough, quorum)
        report()  # what had finished before, while the device decodes
        clock, idle = jax.device_get((state.clock, idle))
        now_nQ = np.array(idle).reshape(parts, -1)
        if on_groups:
            fresh_nQ = np.full((parts, slots[0]), own)  # one size for all levels: one program
            fresh_nQ[:, : now_nQ.shape[1]] = np.where(now_nQ & ~idle_nQ, prompt_nQ, own)
            fresh = _completions(state, fresh_nQ, mesh)
            report = partial(_report, on_groups, fresh_nQ, own, mesh, fresh)
        idle_nQ = now_nQ


def _until(
    idle_nQ: np.ndarray, need_n: np.ndarray, waiting: int, slots: int, on_groups: Any
) -> tuple[np.ndarray, np.int32]:
    """How many idle slots end the decoding in a part, and in how many parts.

    While prompts wait, an eighth of the parts that can take some: the others wait for a refill.
    Then, all that can shrink; or, for reports, some that have finished more.
    """
    parts, idle_n = len(idle_nQ), idle_nQ.sum(-1)
    if on_groups:
        need_n = np.minimum(need_n, idle_n + max(1, slots // REPORTS))
    quorum = parts
    if waiting or on_groups:
        met = (idle_n >= need_n).sum()
        quorum = min(waiting or parts, met + max(1, parts // REPORTS))
    return need_n.astype(np.int32), np.int32(quorum)


def _nothing() -> None:
    pass


def _completions(state: Decoding, prompt_nQ: np.ndarray, mesh: Mesh | None) -> Any:
    """What has been recorded of some prompts of each part, still on the device."""
    index = sharding.feed(prompt_nQ.astype(np.int32).ravel(), mesh)
    return decoding.completions((state.tokens, state.count, state.finished), index, mesh)


def _report(
    on_groups: OnGroups, prompt_nQ: np.ndarray, own: int, mesh: Mesh | None, results: Any
) -> None:
    """Hand over the results of this process's parts; those that name no prompt are left out."""
    for n, columns in sharding.own_parts(results, mesh).items():
        real_Q = prompt_nQ[n] < own
        if real_Q.any():
            on_groups(n * own + prompt_nQ[n][real_Q], *(x[real_Q] for x in columns))


def _fillable(idle_nQ: np.ndarray, rest_n: np.ndarray, refill: int) -> np.ndarray:
    """How many slots of each part to fill: none before a whole refill fits, or all are idle."""
    free_n = idle_nQ.sum(-1)
    ready_n = (free_n >= refill) | idle_nQ.all(-1)
    return np.where(ready_n, np.minimum(np.minimum(refill, rest_n), free_n), 0)


def _fill(plan: Plan, parts: int, own: int, idle_nQ, waiting_n, count_n):
    """Slots and prompts of one refill, each named by its place in its part, i32[n, F] twice.

    Entries that fill nothing name a slot and a prompt out of range.
    """
    refill = plan.refill // parts
    slot_nF = np.full((parts, refill), plan.slots[0] // parts, np.int32)
    prompt_nF = np.full((parts, refill), own, np.int32)
    for i, count in enumerate(count_n):
        slot_nF[i, :count] = np.flatnonzero(idle_nQ[i])[:count]
        prompt_nF[i, :count] = waiting_n[i] + np.arange(count)
    return slot_nF, prompt_nF


def _compile_all(
    plan: Plan, state: Decoding, total: int, mesh, prefill, decode, report
) -> Decoding:
    """Run every program once on empty slots: it compiles, and there is nothing to compute."""
    zero, parts = np.int32(0), sharding.parts(mesh)
    zeros = sharding.feed(np.zeros(parts, np.int32), mesh)

    def keep(level):
        order = np.tile(np.arange(plan.slots[level] // parts, dtype=np.int32), parts)
        return decoding.take(state, sharding.feed(order, mesh), mesh)

    _completions(state, np.full((parts, plan.slots[0] // parts), total // parts), mesh)
    report(f"prefill of {plan.refill} prompts")
    none, idle = np.zeros(parts, int), np.ones((parts, plan.slots[0] // parts), bool)
    nothing = _fill(plan, parts, total // parts, idle, none, none)
    state = prefill(state, *(sharding.feed(x.ravel(), mesh) for x in nothing))
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


@jax.jit
def _ends(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(rollout.mask, -1), rollout.finished


def ends(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each completion, i32[B], and how it ended, i32[B], in every process."""
    return sharding.fetch(_ends(rollout))
