"""What the host decides: every prompt is filled once, nothing shrinks while prompts wait."""

import numpy as np
import pytest

from sapo_jax.sampler import Plan
from sapo_jax.sampler.scheduler import Slots

PROMPTS, T = 24, 24


def idle(slots, ends, clock):
    """Which slots have ended, bool[n, Q]; those that were never filled have."""
    rows = enumerate(slots.prompt)
    return np.array([[ends.get((n, p), 0) <= clock for p in row] for n, row in rows])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("plan", [Plan((8, 4, 2), (4, 12, T), 4), Plan((4,), (T,), 2)], ids=str)
def test_every_prompt_is_filled_and_finishes_once(plan, reports, parts, rng):
    """With a device that only counts: a group filled twice, or dropped while busy, is lost."""
    slots = Slots.empty(plan, PROMPTS, parts)
    ends, finished = {}, []  # of (part, prompt)
    while True:
        while (entries := slots.refill()) is not None:
            for part, (slot_F, prompt_F) in enumerate(zip(*entries, strict=True)):
                for prompt in prompt_F[slot_F < plan.slots[0] // parts]:
                    assert (part, prompt) not in ends
                    ends[part, prompt] = slots.clock + rng.integers(1, T + 1)
        if slots.idle.all():
            break
        waiting = (slots.first_waiting < slots.prompts).any()
        while (slots_nQ := slots.shrink()) is not None:
            assert not waiting
            assert slots_nQ.shape == (parts, plan.slots[slots.level] // parts)
        slots.grow()
        until, enough_n, quorum = slots.stop(reports)
        clock = slots.clock
        while clock < until and (idle(slots, ends, clock).sum(-1) >= enough_n).sum() < quorum:
            clock += 1
        assert clock > slots.clock, "the host would look again at once"
        fresh_nQ = slots.advance(clock, idle(slots, ends, clock))
        finished += [(n, p) for n, row in enumerate(fresh_nQ) for p in row if p < slots.prompts]
    every = [(n, p) for n in range(parts) for p in range(PROMPTS // parts)]
    assert sorted(ends) == sorted(finished) == every
