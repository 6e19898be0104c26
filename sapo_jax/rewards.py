"""From sampled rows to rewards: decode the completions and have their task judge them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo_jax.tasks.base import Example, Task
from sapo_jax.tokenizer import Tokenizer
from sapo_jax.types import STOP


def completion_texts(tokens_BS: np.ndarray, mask_BS: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Decode the completion of every row.

    Args:
        tokens_BS: i32[B, S].
        mask_BS: bool[B, S], true on completion tokens through the stop token.
        tokenizer: the one that made the prompts.

    Returns:
        One text per row, without pad and stop tokens.

    Raises:
        ValueError: the shapes differ, or are not [B, S].
    """
    tokens_BS, mask_BS = np.asarray(tokens_BS), np.asarray(mask_BS, bool)
    if tokens_BS.ndim != 2 or tokens_BS.shape != mask_BS.shape:
        raise ValueError(
            f"tokens and mask must both be [B, S], got {tokens_BS.shape} and {mask_BS.shape}"
        )
    return [
        tokenizer.decode(tokens_S[mask_S].tolist())
        for tokens_S, mask_S in zip(tokens_BS, mask_BS, strict=True)
    ]


def score(
    task: Task, examples: Sequence[Example], completions: Sequence[str], finished_B: np.ndarray
) -> np.ndarray:
    """Reward every completion with its task's verdict; one that ran out of length gets 0.

    Args:
        task: judges the completions.
        examples: B examples, what each row was asked.
        completions: B texts.
        finished_B: i32[B], ``types.STOP`` or ``types.LENGTH``.

    Returns:
        f32[B] in [0, 1], larger is better.

    Raises:
        ValueError: the lengths differ, or the task's verdict is no number of [0, 1].
    """
    finished_B = np.asarray(finished_B)
    rows = len(examples)
    if len(completions) != rows or finished_B.shape != (rows,):
        raise ValueError(
            f"examples, completions and finished must have one entry per row, got {rows}, "
            f"{len(completions)} and shape {finished_B.shape}"
        )
    rewards_B = np.zeros(rows, np.float32)
    for row in np.flatnonzero(finished_B == STOP):
        verdict = task.verify(examples[row], completions[row])
        if not 0.0 <= verdict <= 1.0:  # NaN fails too
            raise ValueError(
                f"task {task.name!r} scored row {row} with {verdict!r}, outside [0, 1]"
            )
        rewards_B[row] = verdict
    return rewards_B
