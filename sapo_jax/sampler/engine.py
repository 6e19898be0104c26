"""Rollouts: prefill once per prompt, decode groups in slots on the device, refill, shrink.

Decoding runs on the device (see `decoding`). The host takes part only between segments of its loop:
to refill slots whose group has finished, to drop empty ones when no prompt waits, and to let the
cache grow to its next size. What it decides follows from replicated values alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.sampler import decode as decoding
from sapo_jax.sampler import decode_state, sampling, scheduler
from sapo_jax.sampler.decode import Decoding
from sapo_jax.sampler.scheduler import Plan, make_plan
from sapo_jax.sampler.weights import moved_bytes, to_sampler
from sapo_jax.types import Prompts, Rollout

__all__ = ["Plan", "check", "ends", "make_plan", "moved_bytes", "rollout", "to_sampler"]


OnGroups = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


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


def _checked(plan: Plan | None, prompts: int, max_new_tokens: int, mesh: Mesh | None) -> Plan:
    """The plan, or one of its own, if prompts and plan divide among the parts of the rows."""
    parts = sharding.parts(mesh)
    if mesh is not None:
        sharding.check(mesh, [sharding.Dimension("prompts", "rows", prompts)])
    plan = plan or make_plan(prompts, max_new_tokens, parts=parts)
    divided = all(n % parts == 0 for n in (*plan.slots, plan.refill))
    if plan.cache[-1] != max_new_tokens or plan.slots[0] > prompts or not divided:
        raise ValueError(
            f"{plan} is not for {prompts} prompts in {parts} parts and {max_new_tokens=}"
        )
    return plan


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
        prompts, config, group_size=group_size, max_new_tokens=max_new_tokens,
        temperature=temperature, domain=domain, truncate=truncate,
    )  # fmt: skip
    p, width = prompts.tokens.shape
    mesh = sharding.mesh_of(params)
    plan = _checked(plan, p, max_new_tokens, mesh)
    prompts = sharding.place(prompts, mesh)
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
            own = p // sharding.parts(mesh)
            every_nP = np.tile(np.arange(own), (p // own, 1))
            _report(on_groups, every_nP, own, mesh, _completions(state, every_nP, mesh))
    else:
        state = _run(plan, state, p, mesh, prefill, decode, on_groups)
    results = (state.tokens, state.logp, state.count, state.finished)
    return decode_state.assemble(config, results, prompts, np.int32(iteration), state.routing, mesh)


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
        while (count_n := scheduler.fillable(idle_nQ, own - waiting_n, plan.refill // parts)).any():
            slot_nF, prompt_nF = scheduler.fill(plan, parts, own, idle_nQ, waiting_n, count_n)
            arguments = (sharding.place(x.ravel(), mesh) for x in (slot_nF, prompt_nF))
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
            order = sharding.place(order_nQ.astype(np.int32).ravel(), mesh)
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
        waiting, reports = (waiting_n < own).sum(), on_groups is not None
        enough_n, quorum = scheduler.until(idle_nQ, need_n, waiting, slots[0], reports)
        enough = sharding.place(enough_n, mesh)
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


def _nothing() -> None:
    pass


def _completions(state: Decoding, prompt_nQ: np.ndarray, mesh: Mesh | None) -> Any:
    """What has been recorded of some prompts of each part, still on the device."""
    index = sharding.place(prompt_nQ.astype(np.int32).ravel(), mesh)
    return decoding.completions((state.tokens, state.count, state.finished), index, mesh)


def _report(
    on_groups: OnGroups, prompt_nQ: np.ndarray, own: int, mesh: Mesh | None, results: Any
) -> None:
    """Hand over the results of this process's parts; those that name no prompt are left out."""
    for n, columns in sharding.own_parts(results, mesh).items():
        real_Q = prompt_nQ[n] < own
        if real_Q.any():
            on_groups(n * own + prompt_nQ[n][real_Q], *(x[real_Q] for x in columns))


def _compile_all(
    plan: Plan, state: Decoding, total: int, mesh, prefill, decode, report
) -> Decoding:
    """Run every program once on empty slots: it compiles, and there is nothing to compute."""
    zero, parts = np.int32(0), sharding.parts(mesh)
    zeros = sharding.place(np.zeros(parts, np.int32), mesh)

    def keep(level):
        order = np.tile(np.arange(plan.slots[level] // parts, dtype=np.int32), parts)
        return decoding.take(state, sharding.place(order, mesh), mesh)

    _completions(state, np.full((parts, plan.slots[0] // parts), total // parts), mesh)
    report(f"prefill of {plan.refill} prompts")
    none, idle = np.zeros(parts, int), np.ones((parts, plan.slots[0] // parts), bool)
    nothing = scheduler.fill(plan, parts, total // parts, idle, none, none)
    state = prefill(state, *(sharding.place(x.ravel(), mesh) for x in nothing))
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
    return sharding.to_host(_ends(rollout))
