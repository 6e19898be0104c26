"""The shapes that a rollout's programs are compiled for."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from sapo_jax.parallel import sharding

FULL = 128  # rows that keep a device busy; more in flight waste more steps at the end
FEWEST = 8  # rows below which a decode step costs about the same
FEW = 32  # steps of a rollout below which what a step and a program cost at least is most of it


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes that a rollout's programs are compiled for.

    Attributes:
      slots: of prompts in flight: the first number while prompts wait, the others when the last
        completions are under way, with fewer and fewer rows in all.
      cache: completion cache sizes, ascending, the last one max_new_tokens. All are for the first
        number of slots, the others have the last one.
      refill: prompts prefilled at a time.
      rows: of a slot, W, for each number of slots; G where there are none, and at most.

    On a mesh the slots and the refill are those of all parts of the rows together.
    """

    slots: tuple[int, ...]
    cache: tuple[int, ...]
    refill: int
    rows: tuple[int, ...] = ()

    def of_part(self, parts: int, group_size: int) -> Plan:
        """The share of one of the parts of the rows."""
        rows = self.rows or (group_size,) * len(self.slots)
        rows = tuple(min(w, group_size) for w in rows)
        return Plan(tuple(n // parts for n in self.slots), self.cache, self.refill // parts, rows)


def make_plan(
    prompts: int,
    max_new_tokens: int,
    *,
    group_size: int = 8,
    slots: int = 0,
    shrink: int = 3,
    parts: int = 1,
    whole: bool = False,
) -> Plan:
    """A plan for a batch of prompts.

    The fewer rows a slot has, the better they are used: those of W rows that end last wait for
    nobody, but have nothing to take. The more slots, the more copies of prompts a step reads.
    Rows computed in decode steps for each token sampled, where a token stops a completion with
    probability 0.03 and the limit is 96 (`tests/sampler/test_scheduler.py` computes them; of
    groups that hold their slot to the end 2.7 to 3.0):

        prompts × G      8 × 8   32 × 8   32 × 16   64 × 8   256 × 8, 32 slots
        slots × rows     8 × 8   32 × 4   32 × 4    64 × 2   128 × 2
        rows / token     1.37    1.24     1.13      1.16     1.16

    Args:
      prompts: P.
      max_new_tokens: the longest completion.
      group_size: G.
      slots: whose groups would be in flight at once, which says how many rows are: slots · G. 0:
        all, or, where that is more than keeps a device busy, down to a quarter of them.
      shrink: how many times the number of rows is halved while the last completions finish; of
        fewer than `FEW` tokens once, to a quarter, or not at all with 0.
      parts: of the rows (see `sharding.parts`), each with as many slots; divides P and the slots.
      whole: slots have G rows and the largest cache from the start, so that completions can go on.
    """
    own, fewest = prompts // parts, group_size if whole else -(-group_size // 4)
    full, halvings = FULL, range(1, shrink + 1)
    if max_new_tokens < FEW:
        full, halvings = 2 * FULL, (2,)[:shrink]
    if 0 < slots < prompts:
        in_flight = max(1, slots // parts) * group_size
        rows = max(fewest, -(-in_flight // own))
        count = in_flight // rows
    else:
        count, rows = own, group_size
        while rows > fewest and own * rows >= 2 * full:
            rows = max(fewest, rows // 2)
    shapes = [(count, rows)]
    for i in halvings:
        if (total := count * rows >> i) < FEWEST:
            break
        width = -(-shapes[-1][1] // 4)
        shapes.append((total // width, width))
    half = -(-max_new_tokens // 2)
    cache = (half, max_new_tokens) if half >= 32 and not whole else (max_new_tokens,)
    refill = count if count == own else max(1, count // 16)
    counts, widths = zip(*shapes, strict=True)
    return Plan(tuple(parts * n for n in counts), cache, parts * refill, widths)


def checked(
    plan: Plan | None, prompts: int, group_size: int, max_new_tokens: int, mesh: Mesh | None
) -> Plan:
    """The plan, or one of its own, if prompts and plan divide among the parts of the rows."""
    parts = sharding.parts(mesh, "slots")
    if mesh is not None:
        sharding.check(mesh, [sharding.Dimension("prompts", "slots", prompts)])
    plan = plan or make_plan(prompts, max_new_tokens, group_size=group_size, parts=parts)
    divided = all(n % parts == 0 for n in (*plan.slots, plan.refill))
    fits = plan.refill <= plan.slots[0] <= prompts and plan.cache[-1] == max_new_tokens
    if not (divided and fits and len(plan.rows) in (0, len(plan.slots))):
        raise ValueError(
            f"{plan} is not for {prompts} prompts in {parts} parts and {max_new_tokens=}"
        )
    return plan
