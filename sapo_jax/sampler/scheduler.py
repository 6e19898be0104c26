"""What the host decides in a rollout: slots to fill, rows to go on with, when to look again.

All of it follows from the plan and from what every process knows, so that all processes run the
same programs. Each of the n parts of the rows has as many prompts, in slots of its own.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from sapo_jax.sampler.plan import Plan

REPORTS = 8  # finished groups are reported in about this many portions
NEVER = np.iinfo(np.int32).max


class Moves(NamedTuple):
    """Where what a part of the rows goes on with comes from; with an axis n, of all parts."""

    slot: np.ndarray  # i32[Q'], whose prompt it is
    order: np.ndarray  # i32[Q', G], completions that wait, then anything
    waiting: np.ndarray  # i32[Q'], their number
    row: np.ndarray  # i32[Q', W'], counted through the slots
    live: np.ndarray  # bool[Q', W'], whether the row comes with a completion


class View(NamedTuple):
    """What the host sees of the slots of all parts; of `decode.decode`, as one array."""

    live: np.ndarray  # bool[n, Q, W], rows with a completion under way
    first: np.ndarray  # int[n, Q], of the waiting completions, as a place in the order
    end: np.ndarray  # int[n, Q], behind the last one
    order: np.ndarray  # int[n, Q, G], completions of the slot's prompt as rows take them

    @classmethod
    def of(cls, table_nQX: np.ndarray, rows: int) -> View:
        """From the columns of a table."""
        live, first, end, order = np.split(table_nQX.copy(), [rows, rows + 1, rows + 2], -1)
        return cls(live.astype(bool), first[..., 0], end[..., 0], order)

    def taken(self) -> View:
        """After rows without a completion have taken one that waits, as on the device."""
        free_nQW = ~self.live
        takes_nQW = free_nQW & (np.cumsum(free_nQW, -1) <= (self.end - self.first)[..., None])
        return self._replace(live=self.live | takes_nQW, first=self.first + takes_nQW.sum(-1))


def pack(prompt: np.ndarray, view: View, slots: int, rows: int) -> Moves | None:
    """Put the completions of a part into other slots; None where they do not fit.

    A prompt whose rows do not fit into one slot comes to stand in several. Slots to spare go to the
    prompts of which most is left.

    Args:
      prompt: int[Q].
      view: of the part, without the axis n.
      slots, rows: Q' and W'.
    """
    source, under_way, waiting = {}, {}, {}  # by prompt
    for q in np.flatnonzero(view.live.any(-1)).tolist():
        p = int(prompt[q])
        source.setdefault(p, q)
        found = q * view.live.shape[1] + np.flatnonzero(view.live[q])
        under_way.setdefault(p, []).extend(found.tolist())
        waiting.setdefault(p, []).extend(view.order[q, view.first[q] : view.end[q]].tolist())
    count = {p: -(-len(found) // rows) for p, found in under_way.items()}
    if sum(count.values()) > slots:
        return None
    left = {p: len(under_way[p]) + len(waiting[p]) for p in count}
    for _ in range(slots - sum(count.values())):
        most = max(count, key=lambda p: left[p] / count[p], default=None)
        if most is None or left[most] <= count[most] * rows:
            break
        count[most] += 1
    moves = Moves(
        np.zeros(slots, np.int32), np.zeros((slots, view.order.shape[1]), np.int32),
        np.zeros(slots, np.int32), np.zeros((slots, rows), np.int32), np.zeros((slots, rows), bool),
    )  # fmt: skip
    places = [(p, i) for p, n in count.items() for i in range(n)]
    for at, (p, i) in enumerate(places):
        own, queue = (found[p][i :: count[p]] for found in (under_way, waiting))
        moves.slot[at], moves.waiting[at] = source[p], len(queue)
        moves.order[at, : len(queue)] = queue
        moves.row[at, : len(own)], moves.live[at, : len(own)] = own, True
    return moves


@dataclasses.dataclass
class Slots:
    """Which prompt is in which slot, for each of n parts of the rows; what the host decides by it.

    Attributes:
      plan, prompts: the shapes to choose from, and the number of prompts, of each part.
      prompt: of the slot, by its place in its part; ``prompts`` for none.
      view: the slots' completions when the host last looked, or as many as there may be.
      first_waiting: the prompt that is filled next, as a place in the line.
      line: the prompts of each part as they are filled.
      level, size: the numbers of slots and the size of the cache, as indices into the plan.
      clock: decode steps done.
      computed: rows computed in them, of all parts.
    """

    plan: Plan
    prompts: int
    prompt: np.ndarray  # int[n, Q]
    view: View
    first_waiting: np.ndarray  # int[n]
    line: np.ndarray  # int[n, P]
    level: int = 0
    size: int = 0
    clock: int = 0
    computed: int = 0

    @classmethod
    def empty(
        cls, plan: Plan, prompts: int, parts: int, group_size: int, first: np.ndarray | None = None
    ) -> Slots:
        """All slots idle, all prompts waiting; the plan's and their number is that of all parts.

        Those with the smallest of the numbers ``first``, i[P], are filled first.
        """
        plan, prompts = plan.of_part(parts, group_size), prompts // parts
        shape, order = (parts, plan.slots[0]), np.arange(group_size)
        view = View(
            np.zeros((*shape, plan.rows[0]), bool), np.zeros(shape, int), np.zeros(shape, int),
            np.broadcast_to(order, (*shape, group_size)).copy(),
        )  # fmt: skip
        line = np.zeros(parts * prompts) if first is None else first
        line = np.argsort(line.reshape(parts, prompts), -1, kind="stable")
        return cls(plan, prompts, np.full(shape, prompts), view, np.zeros(parts, int), line)

    @property
    def idle(self) -> np.ndarray:
        """Slots without a completion under way, bool[n, Q]; then none of theirs waits."""
        return ~self.view.live.any(-1)

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
        idle_nQ, (_, first, end, order) = self.idle, self.view
        for n, count in enumerate(count_n):
            slots = np.flatnonzero(idle_nQ[n])[:count]
            prompts = self.line[n, self.first_waiting[n] :][:count]
            slot_nF[n, :count], prompt_nF[n, :count] = slots, prompts
            self.prompt[n, slots] = prompts
            # Those that end with their first token are not known yet: none of them may.
            first[n, slots], end[n, slots] = 0, order.shape[-1]
        self.view = self.view.taken()
        self.first_waiting = self.first_waiting + count_n
        return slot_nF, prompt_nF

    def shrink(self) -> Moves | None:
        """What to go on with, with an axis n, where all parts fit the plan's next slots.

        Only when no prompt waits: every row costs the same in a decode step, used or not.
        """
        if (self.first_waiting < self.prompts).any() or self.level + 1 == len(self.plan.slots):
            return None
        packed = self.packed()
        return self.move(packed) if all(packed) else None

    def packed(self) -> list[Moves | None]:
        """The next slots of each part, None where its completions do not fit them."""
        slots, rows = (numbers[self.level + 1] for numbers in (self.plan.slots, self.plan.rows))
        return [
            pack(prompt, View(*part), slots, rows) if part[0].sum() <= slots * rows else None
            for prompt, *part in zip(self.prompt, *self.view, strict=True)
        ]

    def move(self, packed: list[Moves]) -> Moves:
        """Go over to the plan's next slots."""
        moves = Moves(*(np.stack(columns) for columns in zip(*packed, strict=True)))
        self.prompt = np.take_along_axis(self.prompt, moves.slot, -1)
        view = View(moves.live, np.zeros_like(moves.waiting), moves.waiting, moves.order)
        self.view = view.taken()
        self.level, self.size = self.level + 1, len(self.plan.cache) - 1
        return moves

    def grow(self) -> int | None:
        """The next size of the completion cache, where the clock has come to the present one.

        Attention reads the cache whole, so that the first completions are to have a short one.
        """
        if self.clock < self.plan.cache[self.size] or self.size + 1 == len(self.plan.cache):
            return None
        self.size += 1
        return self.plan.cache[self.size]

    def stop(self, reports: bool) -> tuple[np.int32, np.ndarray, np.int32]:
        """When to look again: see ``until``, ``limits_2n`` and ``quorum`` of `decode.decode`.

        At the end of the cache, and when there is something to do: while prompts wait, a refill in
        an eighth of the parts (with more, the first ones would wait for the others); afterwards,
        when all can shrink; and, for reports, when some more slots are idle.
        """
        last, parts = self.size + 1 == len(self.plan.cache), len(self.first_waiting)
        until = NEVER if last else self.plan.cache[self.size]
        waiting_n, idle_n = self.first_waiting < self.prompts, self.idle.sum(-1)
        live_n = self.view.live.sum((1, 2))
        idle_enough_n, live_few_n = np.full(parts, NEVER), np.full(parts, -1)
        if waiting := int(waiting_n.sum()):
            idle_enough_n = np.where(waiting_n, self.plan.refill, NEVER)
        else:
            live_few_n = self._few(live_n)
        if reports:
            more_n = idle_n + max(1, self.plan.slots[0] // REPORTS)
            idle_enough_n = np.minimum(idle_enough_n, more_n)
        quorum = parts
        if waiting or reports:
            met = ((idle_n >= idle_enough_n) | (live_n <= live_few_n)).sum()
            quorum = min(waiting or parts, met + max(1, parts // REPORTS))
        limits_n2 = np.stack([idle_enough_n, live_few_n], -1).astype(np.int32)
        return np.int32(until), limits_n2, np.int32(quorum)

    def steps(self, budget: int) -> int:
        """Decode steps that are left of a number of rows to compute."""
        parts, slots, rows = self.view.live.shape
        return max(0, budget - self.computed) // (parts * slots * rows)

    def _few(self, live_n: np.ndarray) -> np.ndarray:
        """Live rows with which a part may fit the next slots; at the end, none."""
        if self.level + 1 == len(self.plan.slots):
            return np.zeros_like(live_n)
        most = self.plan.slots[self.level + 1] * self.plan.rows[self.level + 1]
        fits_n = np.array([packed is not None for packed in self.packed()])
        return np.where(fits_n, NEVER, np.minimum(most, live_n - 1))

    def advance(self, clock: int, table_nQX: np.ndarray) -> np.ndarray:
        """Take note of what the device has done; the prompts that have finished since, int[n, Q₀].

        With ``prompts`` for none, and of one size for all numbers of slots: one program reads them.
        """
        parts, _, rows = self.view.live.shape
        before, self.view = self.idle, View.of(table_nQX, rows)
        fresh_nQ = np.full((parts, self.plan.slots[0]), self.prompts)
        for n, (prompt, idle) in enumerate(zip(self.prompt, self.idle, strict=True)):
            done = np.setdiff1d(prompt[~before[n]], prompt[~idle])
            fresh_nQ[n, : len(done)] = done
        self.computed += (clock - self.clock) * parts * self.idle.shape[1] * rows
        self.clock = clock
        return fresh_nQ
