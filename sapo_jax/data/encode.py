"""From examples to arrays: the held-out set, and the rows that the sampler and learner take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import IMAGE, Example
from sapo_jax.types import Batch, Images, Prompts


def distinct(
    examples: Sequence[Example],
    count: int,
    *,
    keep: Callable[[Example], bool] | None = None,
    task: int = 0,
) -> list[Example]:
    """The first kept examples that differ in their prompt, ``count`` at most."""
    found: dict[tuple[str, int], Example] = {}
    for index in range(len(examples)):
        if len(found) == count:
            break
        example = dataclasses.replace(examples[index], task=task)
        if keep is None or keep(example):
            found.setdefault((example.prompt, example.id), example)
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


def swapped(examples: Sequence[Example]) -> list[Example]:
    """Each example with the images of the next one of its task: a control that sees nothing."""
    alike: dict[tuple[int, int], list] = {}  # images of prompts of a task that have as many
    for e in examples:
        alike.setdefault((e.task, len(e.images)), []).append(e.images)
    following = {key: iter([*every[1:], every[0]]) for key, every in alike.items()}
    return [dataclasses.replace(e, images=next(following[e.task, len(e.images)])) for e in examples]


def _left_aligned(rows: Sequence[Sequence[int]], width: int, pad: int) -> np.ndarray:
    out = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(
                f"row {i} has {len(row)} tokens, more than the {width} there is room for"
            )
        out[i, : len(row)] = row
    return out


def _prompt(example: Example, tokenizer: Tokenizer, room: Any) -> tuple[list[int], Images | None]:
    """Tokens of a prompt, and its images; no images of any prompt without ``room``."""
    name, count, marks = f"example {example.id}", len(example.images), example.prompt.count(IMAGE)
    if count and room is None:
        raise ValueError(f"{name}: images: {count}: must be none, for a run of text alone")
    if count and marks != count:
        raise ValueError(f"{name}: prompt: {marks} {IMAGE} for {count} images: must be equal")
    tokens = tokenizer.encode_prompt(example.prompt, count)
    if room is None:
        return tokens, None
    return room.expand(tokens, example.images, name)


def _prompts(examples, tokenizer, room) -> tuple[list[list[int]], Images | None]:
    """Tokens of each prompt, and the images of each, if prompts may have some."""
    rows, images = zip(*(_prompt(e, tokenizer, room) for e in examples), strict=True)
    return list(rows), jax.tree.map(lambda *x: np.stack(x), *images)


def encode_prompts(
    examples: Sequence[Example], tokenizer: Tokenizer, width: int, room: Any = None
) -> Prompts:
    """Prompts of N = ``width`` tokens, left-aligned.

    Args:
      examples: one a prompt.
      tokenizer: of the policy.
      width: N, images expanded.
      room: what the images of a prompt have room in, a `model.vision.Room`; None for text alone.

    Raises:
      ValueError: a prompt is longer, or has a character that the tokenizer lacks; or images that
        cannot be read, have no room, or are not as many as their places.
    """
    rows, images = _prompts(examples, tokenizer, room)
    return Prompts(
        tokens=_left_aligned(rows, width, tokenizer.pad_id),
        length=np.array([len(row) for row in rows], np.int32),
        id=np.array([example.id for example in examples], np.uint32),
        task=np.array([example.task for example in examples], np.int32),
        images=images,
    )


def encode_demonstrations(
    examples: Sequence[Example], tokenizer: Tokenizer, width: int, room: Any = None
) -> Batch:
    """Worked completions as a batch for supervised learning: REINFORCE with advantage 1.

    Raises:
      ValueError: an example has no demonstration, or does not fit ``width`` tokens.
    """
    for example in examples:
        if not example.demonstration:
            raise ValueError(f"the example {example.prompt!r} has no demonstration to learn from")
    prompts, images = _prompts(examples, tokenizer, room)
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
        images=images,
    )
