"""Rollouts within a budget: what has not ended goes on in the next one, token by token.

The tokens that are there stay, with their log-probabilities and the routing, which are of the
policies that sampled them; their keys and values are computed anew, by the present policy. Each
token draws the noise that it would draw in a whole rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from sapo_jax.model.config import ModelConfig
from sapo_jax.parallel import sharding
from sapo_jax.sampler import decode, engine, images, results, sampling
from sapo_jax.sampler.decode_state import DecodeState
from sapo_jax.sampler.engine import Host, OnGroups
from sapo_jax.sampler.plan import Plan, checked
from sapo_jax.sampler.results import Begun
from sapo_jax.sampler.scheduler import Slots
from sapo_jax.sampler.weights import to_sampler
from sapo_jax.types import Prompts, Rollout


@dataclasses.dataclass(kw_only=True)
class _Host(Host):
    """A rollout within a budget.

    Attributes:
      begun: bool[P], which prompts go on.
      budget: rows that decode steps may compute.
      resume_program: what is left of `decode.resume_slots`.
      least: calls of it behind a prefill, at least.
    """

    begun: np.ndarray
    budget: int
    resume_program: Callable[..., DecodeState]
    least: int

    @property
    def steps(self) -> int:
        """Decode steps that the budget allows."""
        return self.slots.steps(self.budget)

    def prefill(self, slot_nF: np.ndarray, prompt_nF: np.ndarray) -> None:
        """Put prompts into slots; those that go on do, one of each part at a time."""
        super().prefill(slot_nF, prompt_nF)
        begun_nP = np.pad(self.begun.reshape(len(slot_nF), -1), ((0, 0), (0, 1)))
        begun_nF = np.take_along_axis(begun_nP, prompt_nF, 1)
        for i in range(max(self.least, begun_nF.sum(-1).max())):
            there_nF = begun_nF & (np.cumsum(begun_nF, -1) == i + 1)
            at_n1, any_n1 = there_nF.argmax(-1)[:, None], there_nF.any(-1)[:, None]
            none = self.slots.plan.slots[0], self.slots.prompts
            entries = (
                np.where(any_n1, np.take_along_axis(x, at_n1, 1), absent)
                for x, absent in zip((slot_nF, prompt_nF), none, strict=True)
            )
            self.state = self.resume_program(self.state, *map(self.place, entries))


def partial_rollout(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    begun: Begun,
    *,
    begun_P: np.ndarray,
    budget: int,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    policy_step: int,
    plan: Plan,
    domain: str = "train",
    on_groups: OnGroups | None = None,
    on_end: Callable[[int], None] | None = None,
    warm_up: Callable[[str], None] | None = None,
    on_segment: Callable[[], None] | None = None,
) -> tuple[Rollout, Begun]:
    """Sample until all prompts are done, or the budget is; see `rollout`.

    Args:
      params, config: as there.
      prompts: with ``iteration`` and ``occurrence``, which their noise goes by: of prompts that go
        on, those they had at first. The earliest iterations are sampled first.
      begun: what they have, see `results.none_begun`.
      begun_P: bool[P], which prompts have something.
      budget: rows that decode steps may compute.
      policy_step: the iteration of the policy.
      plan: of `make_plan`, with ``whole``.
      group_size, max_new_tokens, temperature, seed, domain: as there.
      on_groups, on_end, warm_up, on_segment: as there; groups that go on are not reported.

    Returns:
      All rows, GOES_ON where a completion does; and what `begun` is for the next one.
    """
    engine.check(prompts, config, group_size, max_new_tokens, domain, truncate=False)
    p, mesh = len(prompts.tokens), sharding.mesh_of(params)
    plan = checked(plan, p, group_size, max_new_tokens, mesh)
    first_P = np.asarray(prompts.iteration)
    params = to_sampler(params, config)
    prompts = sharding.place(images.seen(params, config, prompts, mesh), mesh)
    slots = Slots.empty(plan, p, sharding.parts(mesh), group_size, first_P)
    base, controls = sampling.base_key(np.uint32(seed), domain), sampling.controls(temperature)
    resume = partial(decode.resume_slots, params, config, prompts, mesh=mesh)
    least = int(warm_up is not None)
    host = engine.host_of(
        params, config, prompts, base, controls, slots, max_new_tokens, on_groups=on_groups,
        kind=partial(_Host, begun=begun_P, budget=budget, resume_program=resume, least=least),
    )  # fmt: skip
    host.state = host.state.replace(results=results.go_on(host.state.results, begun, mesh))
    host.run(warm_up, on_segment, on_end)
    step = np.int32(policy_step)
    return results.leave_off(config, host.state.results, prompts, begun, step, mesh)
