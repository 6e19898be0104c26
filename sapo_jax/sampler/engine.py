"""Rollouts: prefill once per prompt, let completions flow through rows on the device, compact.

Decoding runs on the device (see `decode`). The host takes part only between segments of its loop:
to refill slots whose completions have all ended, to go on with fewer rows when no prompt waits, and
to let the cache grow to its next size (see `scheduler`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sapo_jax.cli import several
from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.sampler import decode, decode_state, images, results, sampling
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.sampler.plan import Plan, checked
from sapo_jax.sampler.results import ROWS
from sapo_jax.sampler.scheduler import NEVER, Moves, Slots
from sapo_jax.sampler.weights import to_sampler
from sapo_jax.types import Prompts, Rollout

OnGroups = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def check(prompts, config, group_size, max_new_tokens, domain, truncate) -> None:
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


def _empty(config, shape, mesh, *, beside) -> DecodeState:
    """An empty state, where the parameters lie.

    Programs are compiled apart for placed and unplaced arguments. (Arrays of NumPy have no place.)
    """
    state = decode_state.empty(config, shape, mesh)
    if mesh is None and getattr(beside, "committed", False):
        state = jax.device_put(state, beside.sharding)
    return state


def rollout(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float | Sequence[float],
    seed: int | Sequence[int],
    iteration: int,
    policy_step: int | None = None,
    domain: str = "train",
    top_k: int | None = None,
    top_p: float | None = None,
    plan: Plan | None = None,
    on_groups: OnGroups | None = None,
    on_end: Callable[[int], None] | None = None,
    warm_up: Callable[[str], None] | None = None,
    on_segment: Callable[[], None] | None = None,
) -> Rollout:
    """Sample G completions of each prompt.

    Args:
      params: the learner's parameters, or those of `to_sampler`; on a mesh, so is the rollout. Of
        R runs side by side on it, those of `to_sampler`, the prompts of each behind those of the
        run before, R·P in all, and R temperatures and seeds.
      config: the model's shape; names the stop tokens.
      prompts: P prompts; a prompt draws the same noise wherever it stands, and other noise where it
        stands again.
      group_size: G.
      max_new_tokens: completions end here, or with the first stop token.
      temperature: divides the logits; 0 is greedy.
      seed: of the noise, with iteration and domain: different domains never share noise.
      iteration: of the noise, too, and recorded in the rows as that of the policy.
      policy_step: recorded instead, where an earlier policy samples.
      domain: what the samples are for; "train" or a name of yours.
      top_k: keep the k likeliest tokens; for evaluation only, since the learner's log π is that of
        the whole softmax.
      top_p: keep the smallest set of tokens of at least this probability; for evaluation only.
      plan: shapes to compile for; by default `make_plan`'s, all prompts at once.
      on_groups: called with the completions of some prompts as soon as they are finished, while the
        others are decoded: (index i32[g], tokens i32[g, G, T], count i32[g, G], finished
        i32[g, G]), NumPy arrays; each prompt comes once. With warm_up, all come at the end.
      on_end: called with the number of rows that the decode steps have computed, used or not.
      warm_up: compile every program of the plan instead of sampling, and call this with a line
        about each; the result is a rollout without completions.
      on_segment: called between segments of decoding; may raise, which leaves the rollout.

    Returns:
      Rollout of B = P·G rows of S = N + max_new_tokens tokens, those of one prompt adjacent.

    Raises:
      ValueError: an argument out of its domain.
    """
    truncate = top_k is not None or top_p is not None
    check(prompts, config, group_size, max_new_tokens, domain, truncate)
    p = len(prompts.tokens)
    mesh = sharding.mesh_of(params)
    plan = checked(plan, p, group_size, max_new_tokens, mesh)
    params = to_sampler(params, config)
    prompts = images.seen(params, config, prompts, mesh)
    prompts = sharding.place(sampling.with_occurrence(prompts, sharding.runs(mesh)), mesh, ROWS)
    controls = sampling.controls(temperature, top_k, top_p)
    base = sampling.base_key(np.asarray(seed, np.uint32), domain, np.int32(iteration))
    slots = Slots.empty(plan, p, sharding.parts(mesh, "slots"), group_size)
    host = host_of(
        params, config, prompts, base, controls, slots, max_new_tokens,
        on_groups=on_groups, truncate=truncate,
    )  # fmt: skip
    host.run(warm_up, on_segment, on_end)
    step = np.int32(iteration if policy_step is None else policy_step)
    return results.to_rollout(config, host.state.results, prompts, step, mesh)


def host_of(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    base: jax.Array,
    controls: sampling.Controls,
    slots: Slots,
    max_new_tokens: int,
    *,
    on_groups: OnGroups | None = None,
    truncate: bool = False,
    kind: Callable[..., Host] | None = None,
) -> Host:
    """A rollout before its beginning; the parameters are the sampler's."""
    mesh, plan, (p, width) = sharding.mesh_of(params), slots.plan, prompts.tokens.shape
    count, group_size = plan.slots[0] * sharding.parts(mesh, "slots"), slots.view.order.shape[-1]
    sizes = (plan.rows[0], plan.cache[0], p, width, group_size, max_new_tokens)
    static = {"truncate": truncate, "mesh": mesh}
    return (kind or Host)(
        _empty(config, decode_state.Shape(count, *sizes), mesh, beside=params["final_norm"]),
        slots,
        partial(decode.prefill, params, config, prompts, base, controls, **static),
        partial(decode.decode, params, config, controls, **static),
        partial(results.completions, config, mesh=mesh),
        on_groups,
        mesh,
    )


@dataclasses.dataclass
class Host:
    """A rollout under way: the device's state, what the host knows of it, and the steps between.

    Attributes:
      state: on the device; each program takes it and gives the next.
      slots: which prompt is where.
      prefill_program, decode_program, completions_program: what is left of `decode.prefill`,
        `decode.decode` and `results.completions`.
      fresh: prompts that had finished when the host last looked, and their completions, which may
        still be on the device.
    """

    state: DecodeState
    slots: Slots
    prefill_program: Callable[..., DecodeState]
    decode_program: Callable[..., tuple[DecodeState, jax.Array]]
    completions_program: Callable[..., tuple[jax.Array, ...]]
    on_groups: OnGroups | None
    mesh: Mesh | None
    fresh: tuple[np.ndarray, Any] | None = None

    def run(
        self,
        warm_up: Callable[[str], None] | None,
        on_segment: Callable[[], None] | None,
        on_end: Callable[[int], None] | None,
    ) -> None:
        """Sample until all prompts are done, or the budget is; or compile, see `rollout`."""
        if warm_up:
            self.compile_all(warm_up)
            return
        self.refill()
        while not self.slots.idle.all() and self.steps > 0:
            self.shrink()
            self.grow()
            self.decode()
            if on_segment:
                on_segment()
            self.refill()
        self.report()
        if on_end:
            on_end(self.slots.computed)

    @property
    def steps(self) -> int:
        """Decode steps that are allowed."""
        return NEVER

    def refill(self) -> None:
        """Prefill waiting prompts into idle slots."""
        while self.steps > 0 and (entries := self.slots.refill()) is not None:
            self.prefill(*entries)

    def prefill(self, slot_nF: np.ndarray, prompt_nF: np.ndarray) -> None:
        """Put prompts into slots, see `Slots.fill`."""
        entries = map(self.place, (slot_nF, prompt_nF))
        self.state = self.prefill_program(self.state, *entries)

    def shrink(self) -> None:
        """Go on with fewer rows: a decode step costs the same for an idle one."""
        while (moves := self.slots.shrink()) is not None:
            self._move(moves)

    def grow(self) -> None:
        """Enlarge the cache when the clock has come to its end."""
        if (size := self.slots.grow()) is not None:
            self._grow_to(size)

    def decode(self) -> None:
        """Decode until there is something to do, and report what had finished before."""
        until, limits_n2, quorum = self.slots.stop(reports=self.on_groups is not None)
        until = min(until, np.int32(min(NEVER, self.slots.clock + self.steps)))
        self.state, table = self.decode_program(self.state, until, self.place(limits_n2), quorum)
        # Before the host waits for the device: completions are judged while others are decoded.
        self.report()
        clock, table = jax.device_get((self.state.clock, table))
        table_nQX = table.reshape(len(limits_n2), -1, table.shape[-1])
        fresh_nQ = self.slots.advance(int(clock), table_nQX)
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
        plan, (parts, _) = self.slots.plan, self.slots.prompt.shape
        zero, zeros_n2 = np.int32(0), np.zeros((parts, 2), np.int32)
        self._completions(self.slots.prompt)
        say(f"prefill of {several(plan.refill * parts, 'prompt')}")
        entries = self.slots.fill(zeros_n2[:, 0])
        self.prefill(*entries)
        last, levels = plan.cache[-1], len(plan.slots)
        for level, (count, rows) in enumerate(zip(plan.slots, plan.rows, strict=True)):
            for size in plan.cache if level == 0 else (last,):
                say(f"decoding of {count * parts} × {rows} rows with {size} tokens of cache")
                if level == 0 and size > plan.cache[0]:
                    self._grow_to(size)
                arguments = self.state, zero, self.place(zeros_n2), zero
                self.state, _ = self.decode_program(*arguments)
                if level + 1 < levels and size < last:
                    moves = jax.tree.map(lambda *x: self.place(np.stack(x)), *self.slots.packed())
                    self._move_layer(self.state.prompt_kv[0], self.state.completion_kv[0], moves)
            if level + 1 < levels:
                self._move(self.slots.move(self.slots.packed()))
        if self.on_groups:
            every_nP = np.tile(np.arange(self.slots.prompts), (parts, 1))
            self.fresh = every_nP, self._completions(every_nP)
            self.report()

    def place(self, x_nX: np.ndarray) -> Any:
        """An array of the parts of the rows, each part on its devices."""
        flat = x_nX.reshape(-1, *x_nX.shape[2:])
        flat = flat if flat.dtype == bool else flat.astype(np.int32)
        return sharding.place(flat, self.mesh, ROWS)

    def _move(self, moves: Moves) -> None:
        """Let the state have other slots and rows."""
        state, self.state = self.state, None
        layers = list(zip(state.prompt_kv, state.completion_kv, strict=True))
        sampled, moved = state.results, []
        state = state.replace(prompt_kv=None, completion_kv=None, results=None)
        moves = jax.tree.map(self.place, moves)
        while layers:  # one by one: there is no room for all of the old ones and the new ones
            moved.append(self._move_layer(*layers.pop(0), moves))
        prompt_kv, completion_kv = map(list, zip(*moved, strict=True))
        state = decode_state.move_rows(state, moves, self.mesh)
        caches = {"prompt_kv": prompt_kv, "completion_kv": completion_kv}
        self.state = state.replace(results=sampled, **caches)

    def _move_layer(self, prompt_kv: Any, completion_kv: Any, moves: Moves) -> Any:
        size = self.slots.plan.cache[-1]
        return decode_state.move_cache(prompt_kv, completion_kv, moves, size, self.mesh)

    def _grow_to(self, size: int) -> None:
        layers, self.state = self.state.completion_kv, self.state.replace(completion_kv=None)
        larger = []
        while layers:
            larger.append(decode_state.grow_cache(layers.pop(0), size, self.mesh))
        self.state = self.state.replace(completion_kv=larger)

    def _completions(self, prompt_nQ: np.ndarray) -> tuple[jax.Array, ...]:
        """What has been sampled for some prompts of each part, still on the device."""
        return self.completions_program(self.state.results, self.place(prompt_nQ))


@jax.jit
def _ends(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(rollout.mask, -1), rollout.finished


def ends(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each completion, i32[B], and how it ended, i32[B], in every process."""
    return sharding.to_host(_ends(rollout))
