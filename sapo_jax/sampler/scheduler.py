"""What the host decides in a rollout: groups at a time, slots to fill, when to look again.

Arrays over the n parts of the rows; each part has as many prompts, in slots of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np

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


def until(
    idle_nQ: np.ndarray, need_n: np.ndarray, waiting: int, slots: int, reports: bool
) -> tuple[np.ndarray, np.int32]:
    """How many idle slots end the decoding in a part, and in how many parts.

    While prompts wait, an eighth of the parts that can take some: the others wait for a refill.
    Then, all that can shrink; or, for reports, some that have finished more.
    """
    parts, idle_n = len(idle_nQ), idle_nQ.sum(-1)
    if reports:
        need_n = np.minimum(need_n, idle_n + max(1, slots // REPORTS))
    quorum = parts
    if waiting or reports:
        met = (idle_n >= need_n).sum()
        quorum = min(waiting or parts, met + max(1, parts // REPORTS))
    return need_n.astype(np.int32), np.int32(quorum)


def fillable(idle_nQ: np.ndarray, rest_n: np.ndarray, refill: int) -> np.ndarray:
    """How many slots of each part to fill: none before a whole refill fits, or all are idle."""
    free_n = idle_nQ.sum(-1)
    ready_n = (free_n >= refill) | idle_nQ.all(-1)
    return np.where(ready_n, np.minimum(np.minimum(refill, rest_n), free_n), 0)


def fill(plan: Plan, parts: int, own: int, idle_nQ, waiting_n, count_n):
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
