"""From examples to arrays: the held-out set, and the rows that the sampler and learner take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example
from sapo_jax.types import Batch, Prompts


def distinct(
    examples: Sequence[Example],
    count: int,
    *,
    keep: Callable[[Example], bool] | None = None,
    task: int = 0,
) -> list[Example]:
    """The first kept examples that differ in their prompt, ``count`` at most."""
    found: dict[str, Example] = {}
    for index in range(len(examples)):
        if len(found) == count:
            break
        example = dataclasses.replace(examples[index], task=task)
        if keep is None or keep(example):
            found.setdefault(example.prompt, example)
    return list(found.values())


def held_out(
    examples: Sequence[Example],
    count: int,
    *,
    total: int | None = None,
    field: str = "eval.prompts",
    **which: Any,
) -> list[Example]:
    """A fixed evaluation set: `distinct` examples, of which there must be ``count``.

    Raises:
      ValueError: the split has fewer; ``total`` is what the config's field says, if some are of
        other tasks.
    """
    found = distinct(examples, count, **which)
    if len(found) < count:
        fitting = " that have room" if which.get("keep") else ""
        whose = f"{count} of them are of a task whose" if (total or count) > count else "the"
        raise ValueError(
            f"config.{field}={total or count}: must be smaller: {whose} test split holds only "
            f"{len(found)} distinct prompts{fitting}"
        )
    return found


def _left_aligned(rows: Sequence[Sequence[int]], width: int, pad: int) -> np.ndarray:
    out = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(
                f"row {i} has {len(row)} tokens, more than the {width} there is room for"
            )
        out[i, : len(row)] = row
    return out


def encode_prompts(examples: Sequence[Example], tokenizer: Tokenizer, width: int) -> Prompts:
    """Prompts of N = ``width`` tokens, left-aligned.

    Raises:
      ValueError: a prompt is longer, or has a character that the tokenizer lacks.
    """
    rows = [tokenizer.encode_prompt(example.prompt) for example in examples]
    return Prompts(
        tokens=_left_aligned(rows, width, tokenizer.pad_id),
        length=np.array([len(row) for row in rows], np.int32),
        id=np.array([example.id for example in examples], np.uint32),
        task=np.array([example.task for example in examples], np.int32),
    )


def encode_demonstrations(examples: Sequence[Example], tokenizer: Tokenizer, width: int) -> Batch:
    """Worked completions as a batch for supervised learning: REINFORCE with advantage 1.

    Raises:
      ValueError: an example has no demonstration, or does not fit ``width`` tokens.
    """
    for example in examples:
        if not example.demonstration:
            raise ValueError(f"the example {example.prompt!r} has no demonstration to learn from")
    prompts = [tokenizer.encode_prompt(e.prompt) for e in examples]
    answers = [[*tokenizer.encode(e.demonstration), tokenizer.stop_ids[0]] for e in examples]
    rows = [p + a for p, a in zip(prompts, answers, strict=True)]
    index_S = np.arange(width)
    start_B1 = np.array([[len(p)] for p in prompts])
    end_B1 = np.array([[len(row)] for row in rows])
    zeros_BS = np.zeros((len(rows), width), np.float32)
    return Batch(
        tokens=_left_aligned(rows, width, tokenizer.pad_id),
        mask=(index_S >= start_B1) & (index_S < end_B1),
        segments=(index_S < end_B1).astype(np.int32),
        sampler_logp=zeros_BS,
        old_logp=zeros_BS,
        advantages=np.ones(len(rows), np.float32),
    )
