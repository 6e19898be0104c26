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

from sapo_jax import decoding, sampling
from sapo_jax.decoding import Decoding, to_sampler
from sapo_jax.model.config import ModelConfig
from sapo_jax.types import Prompts, Rollout

__all__ = ["Plan", "check", "make_plan", "rollout", "to_sampler"]


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
    """

    slots: tuple[int, ...]
    cache: tuple[int, ...]
    refill: int


def make_plan(prompts: int, max_new_tokens: int, *, slots: int = 0, shrink: int = 2) -> Plan:
    """A plan for a batch of prompts.

    Args:
      prompts: P.
      max_new_tokens: the longest completion.
      slots: groups in flight; 0 takes all prompts at once.
      shrink: how many times the number of slots is halved while the last groups finish.
    """
    slots = min(slots or prompts, prompts)
    levels = [max(1, slots >> i) for i in range(shrink + 1)]
    sizes = [max_new_tokens]
    while sizes[-1] > 32 and len(sizes) < 4:
        sizes.append(-(-sizes[-1] // 2))
    refill = slots if slots == prompts else max(1, slots // 4)
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
      params: the learner's parameters, or those of `to_sampler`.
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
    plan = plan or make_plan(p, max_new_tokens)
    if plan.cache[-1] != max_new_tokens or plan.slots[0] > p:
        raise ValueError(f"{plan} is not for {p} prompts and {max_new_tokens=}")
    controls = sampling.controls(temperature, top_k, top_p)
    weights = to_sampler(params, config)
    base = decoding.base_key(np.uint32(seed), domain, np.int32(iteration))
    prefill = partial(decoding.prefill, weights, config, prompts, base, controls, truncate=truncate)
    decode = partial(decoding.decode, weights, config, controls, truncate=truncate)
    state = decoding.empty(
        config, plan.slots[0], plan.cache[0], p, width, group_size, max_new_tokens
    )
    if getattr(weights["final_norm"], "committed", False):  # arrays of NumPy have no place
        # Programs are compiled apart for placed and unplaced arguments: place them from the start.
        state = jax.device_put(state, weights["final_norm"].sharding)
    if warm_up:
        state = _compile_all(plan, state, prefill, decode, warm_up)
        if on_groups:
            _report(on_groups, np.arange(p), (state.tokens, state.count, state.finished))
    else:
        state = _run(plan, state, p, prefill, decode, on_groups)
    results = (state.tokens, state.logp, state.count, state.finished)
    return decoding.assemble(config, results, prompts, np.int32(iteration), state.routing)


def _run(plan: Plan, state: Decoding, total: int, prefill, decode, on_groups) -> Decoding:
    """The host's part: refill, shrink, grow, and decode until all prompts are done."""
    waiting = level = size = clock = 0
    idle = np.ones(plan.slots[0], bool)
    prompt_Q = np.full(plan.slots[0], total, np.int32)
    report = _nothing
    while True:
        free = np.flatnonzero(idle)
        while waiting < total and (free.size >= plan.refill or idle.all()):
            count = min(plan.refill, total - waiting, free.size)
            new = np.arange(waiting, waiting + count)
            state = prefill(state, *_fill(plan, free[:count], new, total))
            idle[free[:count]], prompt_Q[free[:count]] = False, new
            waiting, free = waiting + count, free[count:]
        if idle.all():
            report()
            return state
        while waiting == total and _shrinks(plan, level, idle):
            level += 1
            order = np.argsort(idle, kind="stable")[: plan.slots[level]]
            state = decoding.take(state, order.astype(np.int32))
            idle, prompt_Q = idle[order], prompt_Q[order]
        if clock >= plan.cache[size] and size + 1 < len(plan.cache):
            size += 1
            state = state.replace(own_kv=decoding.grow(state.own_kv, plan.cache[size]))
        grows = size + 1 < len(plan.cache)
        until = plan.cache[size] if grows else np.iinfo(np.int32).max
        enough = plan.refill
        if waiting == total:
            enough = plan.slots[level] - (plan.slots[level + 1 :] or (0,))[0]
        if on_groups:
            enough = min(enough, np.sum(idle) + max(1, plan.slots[0] // REPORTS))
        state, now_idle = decode(state, np.int32(until), np.int32(enough))
        report()  # what had finished before, while the device decodes
        clock, now_idle = jax.device_get((state.clock, now_idle))
        if on_groups:
            report = partial(
                _report, on_groups, *_finished(plan, state, prompt_Q, now_idle & ~idle)
            )
        idle = np.array(now_idle)


def _nothing() -> None:
    pass


def _finished(plan: Plan, state: Decoding, prompt_Q, fresh_Q) -> tuple[np.ndarray, Any]:
    """Prompts that have just finished, and their completions, still on the device."""
    index = prompt_Q[fresh_Q]
    padded = np.full(plan.slots[0], state.tokens.shape[0] - 1, np.int32)
    padded[: len(index)] = index
    return index, decoding.completions((state.tokens, state.count, state.finished), padded)


def _report(on_groups: OnGroups, index: np.ndarray, results: Any) -> None:
    if len(index):
        on_groups(index, *(x[: len(index)] for x in jax.device_get(results)))


def _fill(plan: Plan, slots, prompts, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots and prompts of one refill; entries that fill nothing name a slot out of range."""
    slot_F = np.full(plan.refill, plan.slots[0], np.int32)
    prompt_F = np.full(plan.refill, total, np.int32)
    slot_F[: len(slots)], prompt_F[: len(slots)] = slots, prompts
    return slot_F, prompt_F


def _shrinks(plan: Plan, level: int, idle: np.ndarray) -> bool:
    return level + 1 < len(plan.slots) and np.sum(~idle) <= plan.slots[level + 1]


def _compile_all(plan: Plan, state: Decoding, prefill, decode, report) -> Decoding:
    """Run every program once on empty slots: it compiles, and there is nothing to compute."""
    zero = np.int32(0)
    _finished(plan, state, np.zeros(0, np.int32), np.zeros(0, bool))
    report(f"prefill of {plan.refill} prompts")
    state = prefill(state, *_fill(plan, [], [], state.tokens.shape[0] - 1))
    for level, slots in enumerate(plan.slots):
        last = level + 1 == len(plan.slots)
        smaller = (
            None if last else decoding.take(state, np.arange(plan.slots[level + 1], dtype=np.int32))
        )
        for i, size in enumerate(plan.cache):
            report(f"decoding of {slots} groups with {size} tokens of cache")
            if i:
                state = state.replace(own_kv=decoding.grow(state.own_kv, size))
            if not last:
                decoding.take(state, np.arange(plan.slots[level + 1], dtype=np.int32))
            state, _ = decode(state, zero, zero)
        state = state if last else smaller
    return state
