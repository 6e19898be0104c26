"""Rollouts: prefill once per prompt, decode groups in slots on the device, refill, shrink.

Decoding runs on the device (see `decode`). The host takes part only between segments of its loop:
to refill slots whose group has finished, to drop empty ones when no prompt waits, and to let the
cache grow to its next size (see `scheduler`).
"""

from __future__ import annotations

import dataclasses
import itertools
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
from sapo_jax.sampler import decode, decode_state, sampling
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.sampler.scheduler import Plan, Slots, make_plan
from sapo_jax.sampler.weights import to_sampler
from sapo_jax.types import Prompts, Rollout

OnGroups = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def _check(prompts, config, group_size, max_new_tokens, domain, truncate) -> None:
    """Refuse what cannot be sampled, before anything is compiled."""
    chex.assert_rank(prompts.tokens, 2)
    chex.assert_shape([prompts.length, prompts.id], prompts.tokens.shape[:1])
    width = prompts.tokens.shape[1]
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"{group_size=}, {max_new_tokens=}: must be at least 1")
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
    on_segment: Callable[[], None] | None = None,
) -> Rollout:
    """Sample G completions of each prompt.

    Args:
      params: the learner's parameters, or those of `to_sampler`; on a mesh, so is the rollout.
      config: the model's shape; names the stop tokens.
      prompts: P prompts; a prompt draws the same noise wherever it stands, and other noise where it
        stands again.
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
      on_segment: called between segments of decoding; may raise, which leaves the rollout.

    Returns:
      Rollout of B = P·G rows of S = N + max_new_tokens tokens, those of one prompt adjacent.

    Raises:
      ValueError: an argument out of its domain.
    """
    truncate = top_k is not None or top_p is not None
    _check(prompts, config, group_size, max_new_tokens, domain, truncate)
    p, width = prompts.tokens.shape
    mesh = sharding.mesh_of(params)
    plan = _checked(plan, p, max_new_tokens, mesh)
    prompts = sharding.place(sampling.with_occurrence(prompts), mesh)
    controls = sampling.controls(temperature, top_k, top_p)
    params = to_sampler(params, config)
    base = sampling.base_key(np.uint32(seed), domain, np.int32(iteration))
    sizes = (plan.slots[0], plan.cache[0], p, width, group_size, max_new_tokens)
    state = decode_state.empty(config, decode_state.Shape(*sizes), mesh)
    # Programs are compiled apart for placed and unplaced arguments: the state lies from the start
    # where the parameters do. (Arrays of NumPy have no place.)
    if mesh is None and getattr(params["final_norm"], "committed", False):
        state = jax.device_put(state, params["final_norm"].sharding)
    static = {"truncate": truncate, "mesh": mesh}
    host = _Host(
        state,
        Slots.empty(plan, p, sharding.parts(mesh)),
        partial(decode.prefill, params, config, prompts, base, controls, **static),
        partial(decode.decode, params, config, controls, **static),
        on_groups,
        mesh,
    )
    if warm_up:
        host.compile_all(warm_up)
    else:
        host.run(on_segment or (lambda: None))
    return decode_state.to_rollout(config, host.state.results, prompts, np.int32(iteration), mesh)


@dataclasses.dataclass
class _Host:
    """A rollout under way: the device's state, what the host knows of it, and the steps between.

    Attributes:
      state: on the device; each program takes it and gives the next.
      slots: which prompt is where.
      prefill_program, decode_program: what is left of `decode.prefill` and `decode.decode`.
      fresh: prompts that had finished when the host last looked, and their completions, which may
        still be on the device.
    """

    state: DecodeState
    slots: Slots
    prefill_program: Callable[..., DecodeState]
    decode_program: Callable[..., tuple[DecodeState, jax.Array]]
    on_groups: OnGroups | None
    mesh: Mesh | None
    fresh: tuple[np.ndarray, Any] | None = None

    def run(self, on_segment: Callable[[], None]) -> None:
        """Sample until all prompts are done."""
        self.refill()
        while not self.slots.idle.all():
            self.shrink()
            self.grow()
            self.decode()
            on_segment()
            self.refill()
        self.report()

    def refill(self) -> None:
        """Prefill waiting prompts into idle slots."""
        while (entries := self.slots.refill()) is not None:
            self.state = self.prefill_program(self.state, *map(self._place, entries))

    def shrink(self) -> None:
        """Go on with fewer slots: a decode step costs the same for an empty one."""
        while (slots_nQ := self.slots.shrink()) is not None:
            self.state = self._select(slots_nQ)

    def grow(self) -> None:
        """Enlarge the cache when the clock has come to its end."""
        if (size := self.slots.grow()) is not None:
            self._grow_to(size)

    def decode(self) -> None:
        """Decode until there is something to do, and report what had finished before."""
        until, enough_n, quorum = self.slots.stop(reports=self.on_groups is not None)
        self.state, idle = self.decode_program(self.state, until, self._place(enough_n), quorum)
        # Before the host waits for the device: completions are judged while others are decoded.
        self.report()
        clock, idle = jax.device_get((self.state.clock, idle))
        fresh_nQ = self.slots.advance(int(clock), np.array(idle).reshape(len(enough_n), -1))
        if self.on_groups:
            self.fresh = fresh_nQ, self._completions(fresh_nQ)

    def report(self) -> None:
        """Hand over what is fresh in this process's parts; entries may name no prompt."""
        if self.fresh is None:
            return
        (prompt_nQ, arrays), self.fresh = self.fresh, None
        count = self.slots.prompts
        for n, columns in sharding.own_parts(arrays, self.mesh).items():
            real_Q = prompt_nQ[n] < count
            if real_Q.any():
                self.on_groups(n * count + prompt_nQ[n][real_Q], *(x[real_Q] for x in columns))

    def compile_all(self, say: Callable[[str], None]) -> None:
        """Run every program once on empty slots: it compiles, and there is nothing to compute."""
        plan, parts = self.slots.plan, len(self.slots.idle)
        zero, zeros_n = np.int32(0), np.zeros(parts, np.int32)
        self._completions(self.slots.prompt)
        say(f"prefill of {plan.refill * parts} prompts")
        self.state = self.prefill_program(self.state, *map(self._place, self.slots.fill(zeros_n)))
        for count, fewer in itertools.pairwise((*plan.slots, 0)):
            first_nQ, smaller = np.tile(np.arange(fewer), (parts, 1)), None
            for i, size in enumerate(plan.cache):
                say(f"decoding of {count * parts} groups with {size} tokens of cache")
                if i:
                    self._grow_to(size)
                if fewer:  # slots may become fewer at any size of the cache
                    selected = self._select(first_nQ)
                    smaller = smaller or selected
                self.state, _ = self.decode_program(self.state, zero, self._place(zeros_n), zero)
            self.state = smaller or self.state
        if self.on_groups:
            every_nP = np.tile(np.arange(self.slots.prompts), (parts, 1))
            self.fresh = every_nP, self._completions(every_nP)
            self.report()

    def _place(self, x_n: np.ndarray) -> Any:
        """An array of the parts of the rows, each part on its devices."""
        return sharding.place(x_n.astype(np.int32).ravel(), self.mesh)

    def _select(self, slots_nQ: np.ndarray) -> DecodeState:
        return decode_state.select_slots(self.state, self._place(slots_nQ), self.mesh)

    def _grow_to(self, size: int) -> None:
        larger = decode_state.grow_cache(self.state.completion_kv, size, self.mesh)
        self.state = self.state.replace(completion_kv=larger)

    def _completions(self, prompt_nQ: np.ndarray) -> tuple[jax.Array, ...]:
        """What has been sampled for some prompts of each part, still on the device."""
        return decode_state.completions(self.state.results, self._place(prompt_nQ), self.mesh)


@jax.jit
def _ends(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(rollout.mask, -1), rollout.finished


def ends(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each completion, i32[B], and how it ended, i32[B], in every process."""
    return sharding.to_host(_ends(rollout))
