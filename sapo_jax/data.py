"""From a task's examples to arrays: a seeded stream with a resumable position, and encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sapo_jax.tasks.base import Example
from sapo_jax.tokenizer import Tokenizer
from sapo_jax.types import Batch, Prompts


@dataclasses.dataclass
class Stream:
    """Examples in a shuffled order, epoch after epoch, from a position that a checkpoint keeps.

    Args:
      examples: where they come from.
      seed: of the order; each epoch has its own.
      position: examples taken so far.
    """

    examples: Sequence[Example]
    seed: int
    position: int = 0

    def __post_init__(self):
        import grain

        self._order = grain.MapDataset.range(len(self.examples)).seed(self.seed).shuffle().repeat()

    def take(self, count: int) -> list[Example]:
        """The next examples."""
        indices = range(self.position, self.position + count)
        self.position += count
        return [self.examples[int(self._order[i])] for i in indices]


def held_out(examples: Sequence[Example], count: int) -> list[Example]:
    """The first ``count`` examples that differ in their prompt: a fixed evaluation set.

    Raises:
      ValueError: the split has fewer.
    """
    distinct: dict[str, Example] = {}
    for index in range(len(examples)):
        distinct.setdefault(examples[index].prompt, examples[index])
        if len(distinct) == count:
            return list(distinct.values())
    raise ValueError(f"eval.prompts={count}: the split holds only {len(distinct)} distinct prompts")


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
    rows = [tokenizer.encode(example.prompt) for example in examples]
    return Prompts(
        tokens=_left_aligned(rows, width, tokenizer.pad_id),
        length=np.array([len(row) for row in rows], np.int32),
        id=np.array([example.id for example in examples], np.uint32),
        task=np.zeros(len(rows), np.int32),
    )


def encode_demonstrations(examples: Sequence[Example], tokenizer: Tokenizer, width: int) -> Batch:
    """Worked completions as a batch for supervised learning: REINFORCE with advantage 1.

    Raises:
      ValueError: an example has no demonstration, or does not fit ``width`` tokens.
    """
    for example in examples:
        if not example.demonstration:
            raise ValueError(f"the example {example.prompt!r} has no demonstration to learn from")
    prompts = [tokenizer.encode(e.prompt) for e in examples]
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
