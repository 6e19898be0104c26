"""What the host decides in a rollout: groups at a time, slots to fill, when to look again.

All of it follows from the plan and from what every process knows, so that all processes run the
same programs. Each of the n parts of the rows has as many prompts, in slots of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np

REPORTS = 8  # finished groups are reported in about this many portions


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

    def of_part(self, parts: int) -> Plan:
        """The share of one of the parts of the rows."""
        return Plan(tuple(n // parts for n in self.slots), self.cache, self.refill // parts)


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


@dataclasses.dataclass
class Slots:
    """Which prompt is in which slot, for each of n parts of the rows; what the host decides by it.

    Attributes:
      plan, prompts: the shapes to choose from, and the number of prompts, of each part.
      prompt: of the slot, by its place in its part; ``prompts`` for none.
      idle: all completions of the slot have ended, or it was never filled.
      first_waiting: the prompt that is filled next.
      level, size: the numbers of slots and the size of the cache, as indices into the plan.
      clock: decode steps done.
    """

    plan: Plan
    prompts: int
    prompt: np.ndarray  # int[n, Q]
    idle: np.ndarray  # bool[n, Q]
    first_waiting: np.ndarray  # int[n]
    level: int = 0
    size: int = 0
    clock: int = 0

    @classmethod
    def empty(cls, plan: Plan, prompts: int, parts: int) -> Slots:
        """All slots idle, all prompts waiting; the plan's and their number is that of all parts."""
        plan, prompts = plan.of_part(parts), prompts // parts
        shape = (parts, plan.slots[0])
        return cls(
            plan, prompts, np.full(shape, prompts), np.ones(shape, bool), np.zeros(parts, int)
        )

    def refill(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Slots and prompts of the next prefill, see `fill`; None where there is none.

        A prefill costs the same however few prompts it has: a part waits until it has a whole one,
        or all its slots are idle.
        """
        free_n, refill = self.idle.sum(-1), self.plan.refill
        ready_n = (free_n >= refill) | self.idle.all(-1)
        most_n = np.minimum(np.minimum(refill, self.prompts - self.first_waiting), free_n)
        count_n = np.where(ready_n, most_n, 0)
        return self.fill(count_n) if count_n.any() else None

    def fill(self, count_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put so many of the waiting prompts into idle slots, i32[n, F] twice: slot and prompt.

        Each is named by its place in its part; entries that fill nothing name one out of range.
        """
        slot_nF = np.full((len(count_n), self.plan.refill), self.plan.slots[0], np.int32)
        prompt_nF = np.full(slot_nF.shape, self.prompts, np.int32)
        for n, count in enumerate(count_n):
            slots = np.flatnonzero(self.idle[n])[:count]
            prompts = self.first_waiting[n] + np.arange(count)
            slot_nF[n, :count], prompt_nF[n, :count] = slots, prompts
            self.prompt[n, slots], self.idle[n, slots] = prompts, False
        self.first_waiting = self.first_waiting + count_n
        return slot_nF, prompt_nF

    def shrink(self) -> np.ndarray | None:
        """The slots to go on with, i32[n, Q'], where the busy ones fit the next smaller number.

        Only when no prompt waits: every slot costs the same in a decode step, used or not.
        """
        if (self.first_waiting < self.prompts).any() or self.level + 1 == len(self.plan.slots):
            return None
        fewer = self.plan.slots[self.level + 1]
        if (~self.idle).sum(-1).max() > fewer:
            return None
        busy_first_nQ = np.argsort(self.idle, axis=-1, kind="stable")[:, :fewer]
        self.idle = np.take_along_axis(self.idle, busy_first_nQ, -1)
        self.prompt = np.take_along_axis(self.prompt, busy_first_nQ, -1)
        self.level += 1
        return busy_first_nQ.astype(np.int32)

    def grow(self) -> int | None:
        """The next size of the completion cache, where the clock has come to the present one.

        Attention reads the cache whole, so that short completions are to have a short one.
        """
        if self.clock < self.plan.cache[self.size] or self.size + 1 == len(self.plan.cache):
            return None
        self.size += 1
        return self.plan.cache[self.size]

    def stop(self, reports: bool) -> tuple[np.int32, np.ndarray, np.int32]:
        """When to look again: see ``until``, ``enough_n`` and ``quorum`` of `decode.decode`.

        At the end of the cache, and when there is something to do: while prompts wait, a refill in
        an eighth of the parts (with more, the first ones would wait for the others); afterwards,
        when all can shrink; and, for reports, when some more slots have finished.
        """
        last, parts = self.size + 1 == len(self.plan.cache), len(self.first_waiting)
        until = np.iinfo(np.int32).max if last else self.plan.cache[self.size]
        waiting_n, idle_n = self.first_waiting < self.prompts, self.idle.sum(-1)
        slots, fewer = (*self.plan.slots, 0)[self.level : self.level + 2]
        if waiting := int(waiting_n.sum()):
            enough_n = np.where(waiting_n, self.plan.refill, slots + 1)
        else:
            enough_n = np.full(parts, slots - fewer)
        if reports:
            enough_n = np.minimum(enough_n, idle_n + max(1, self.plan.slots[0] // REPORTS))
        quorum = parts
        if waiting or reports:
            met = (idle_n >= enough_n).sum()
            quorum = min(waiting or parts, met + max(1, parts // REPORTS))
        return np.int32(until), enough_n.astype(np.int32), np.int32(quorum)

    def advance(self, clock: int, idle_nQ: np.ndarray) -> np.ndarray:
        """Take note of what the device has done; the prompts that have finished since, int[n, Q₀].

        With ``prompts`` for none, and of one size for all numbers of slots: one program reads them.
        """
        fresh_nQ = np.full((len(idle_nQ), self.plan.slots[0]), self.prompts)
        fresh_nQ[:, : idle_nQ.shape[1]] = np.where(idle_nQ & ~self.idle, self.prompt, self.prompts)
        self.clock, self.idle = clock, idle_nQ
        return fresh_nQ
