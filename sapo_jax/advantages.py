"""Advantages from rewards: baselines and normalisation over the G completions of a prompt.

Rows of one prompt are adjacent. A group whose rewards are all equal carries no signal and gets
exactly 0; this is decided by max = min, since the float standard deviation of equal numbers is a
rounding error, which dividing by turns into advantages of order 1.

A penalty, such as the KL in the reward, is subtracted by the estimators, not before: equality and
the scale are those of the rewards alone. Where these are equal, up to rounding, the penalty's scale
is 1. So advantages are continuous in the penalty, whose rounding errors are never normalised.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import masked
from sapo_jax.types import Weighted


def _grouped(rewards_B: jax.Array, group_size: int, at_least: int) -> jax.Array:
    chex.assert_rank(rewards_B, 1)
    if group_size < at_least:
        raise ValueError(f"group_size={group_size}: must be at least {at_least}")
    if rewards_B.shape[0] % group_size:
        raise ValueError(
            f"rewards of {rewards_B.shape[0]} rows do not divide into groups of {group_size}"
        )
    return rewards_B.reshape(-1, group_size)


def _penalty_scale(high: jax.Array, low: jax.Array, scale: jax.Array | float) -> jax.Array:
    """What divides a penalty, from the largest and smallest reward, and what divides rewards."""
    rounding = 1e-6 * jnp.maximum(jnp.abs(high), jnp.abs(low))
    return jnp.where(high - low <= rounding, 1, scale)


def _centred(
    rewards_PG: jax.Array, penalty_B: jax.Array | None, scale_P1: jax.Array | float = 1.0
) -> jax.Array:
    """(R − penalty − mean) / scale within each group, f[B]."""

    def centre(x_PG):
        return x_PG - x_PG.mean(-1, keepdims=True)

    high_P1, low_P1 = rewards_PG.max(-1, keepdims=True), rewards_PG.min(-1, keepdims=True)
    advantages_PG = jnp.where(high_P1 == low_P1, 0, centre(rewards_PG) / scale_P1)
    if penalty_B is not None:
        penalty_PG = centre(penalty_B.reshape(rewards_PG.shape))
        advantages_PG -= penalty_PG / _penalty_scale(high_P1, low_P1, scale_P1)
    return advantages_PG.reshape(-1)


def group(
    rewards_B: jax.Array,
    group_size: int,
    penalty_B: jax.Array | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """Group-normalised advantages: A = (R − mean) / (std + ε) within each group.

    Source: GRPO, arXiv 2402.03300, section 4.1; the sample standard deviation (ddof 1) as in TRL
    and verl.

    Args:
      rewards_B: f[B], the rows of a prompt adjacent.
      group_size: G ≥ 2 (≥ 1 + ddof).
      penalty_B: f[B], subtracted from the rewards, whose std stays.
      ddof: 1 for the sample, 0 for the population standard deviation.
      eps: added to the standard deviation.

    Returns:
      f[B], exactly 0 in groups whose rewards are all equal, but for the penalty.

    Raises:
      ValueError: the group size is too small or does not divide B.
    """
    rewards_PG = _grouped(rewards_B, group_size, max(2, 1 + ddof))
    std_P1 = rewards_PG.std(-1, ddof=ddof, keepdims=True)
    return _centred(rewards_PG, penalty_B, std_P1 + eps)


def leave_one_out(
    rewards_B: jax.Array, group_size: int, penalty_B: jax.Array | None = None
) -> jax.Array:
    """Leave-one-out advantages: A_i = R_i − mean_{j ≠ i} R_j.

    Source: RLOO, arXiv 2402.14740, section 2.2.

    Args:
      rewards_B: f[B], the rows of a prompt adjacent.
      group_size: G ≥ 2.
      penalty_B: f[B], subtracted from the rewards.

    Returns:
      f[B], exactly 0 in groups whose rewards are all equal, but for the penalty.

    Raises:
      ValueError: the group size is too small or does not divide B.
    """
    return mean(rewards_B, group_size, penalty_B) * group_size / (group_size - 1)


def mean(rewards_B: jax.Array, group_size: int, penalty_B: jax.Array | None = None) -> jax.Array:
    """Mean-only advantages: A = R − mean, without the standard deviation.

    Source: Dr. GRPO, arXiv 2503.20783, section 3.2.

    Args:
      rewards_B: f[B], the rows of a prompt adjacent.
      group_size: G ≥ 2.
      penalty_B: f[B], subtracted from the rewards.

    Returns:
      f[B], exactly 0 in groups whose rewards are all equal, but for the penalty.

    Raises:
      ValueError: the group size is too small or does not divide B.
    """
    return _centred(_grouped(rewards_B, group_size, 2), penalty_B)


def reinforce_pp(
    rewards_B: jax.Array,
    valid_B: jax.Array | None = None,
    penalty_B: jax.Array | None = None,
    *,
    eps: float = 1e-8,
) -> jax.Array:
    """Globally whitened rewards: A = (R − mean over the batch) / (std over the batch + ε).

    Source: REINFORCE++, arXiv 2501.03262, section 3.2.

    Args:
      rewards_B: f[B].
      valid_B: bool[B], rows that count; all by default.
      penalty_B: f[B], subtracted from the rewards, whose std stays.
      eps: added to the standard deviation (ddof 0).

    Returns:
      f[B], exactly 0 where rows do not count or, but for the penalty, where all rewards that count
      are equal.

    Raises:
      ValueError: there are fewer than 2 rows.
    """
    chex.assert_rank(rewards_B, 1)
    if len(rewards_B) < 2:
        raise ValueError(f"{len(rewards_B)} rewards: must be at least 2, to be compared")
    valid_B = jnp.ones(rewards_B.shape, bool) if valid_B is None else valid_B
    count = jnp.sum(valid_B, dtype=rewards_B.dtype)

    def centre(x_B):
        return x_B - masked.ratio(masked.mean(x_B, valid_B))

    centred_B = centre(rewards_B)
    variance = masked.ratio(Weighted(jnp.sum(masked.keep(centred_B**2, valid_B)), count))
    high = jnp.max(jnp.where(valid_B, rewards_B, -jnp.inf))
    low = jnp.min(jnp.where(valid_B, rewards_B, jnp.inf))
    scale = jnp.sqrt(variance) + eps
    advantages_B = jnp.where(high == low, 0, centred_B / scale)
    if penalty_B is not None:
        advantages_B -= centre(penalty_B) / _penalty_scale(high, low, scale)
    return jnp.where(valid_B, advantages_B, 0)


def informative(
    rewards_B: np.ndarray, group_size: int, prompts: int, parts: int = 1
) -> tuple[np.ndarray, ...]:
    """Dynamic sampling: the first P prompts whose completions do not all get the same reward.

    Where there are fewer, each part has its share of them, and prompts without a signal follow
    there, so that the number is always the same.
    Source: DAPO, arXiv 2503.14476, section 3.2, which draws again until a batch is full.

    Args:
      rewards_B: f[B] of more prompts than are wanted, the rows of a prompt adjacent; on the host.
      group_size: G.
      prompts: P, the prompts to keep.
      parts: of equal size, into which the rows will be cut.

    Returns:
      (i32[P·G], rows in their order; bool[P·G], whether their group has a signal).

    Raises:
      ValueError: the group size does not divide B or is less than 2, there are fewer than P
        prompts, or the parts do not divide P.
    """
    if group_size < 2 or prompts % parts:
        raise ValueError(
            f"group_size={group_size}: must be at least 2; parts={parts}: must divide {prompts}"
        )
    if len(rewards_B) % group_size or len(rewards_B) < prompts * group_size:
        raise ValueError(
            f"{len(rewards_B)} rewards: must be those of at least {prompts} groups of {group_size}"
        )
    rewards_PG = np.asarray(rewards_B).reshape(-1, group_size)
    signal_P = rewards_PG.max(-1) > rewards_PG.min(-1)
    rest, chosen = np.flatnonzero(~signal_P), []
    for own in np.array_split(np.flatnonzero(signal_P)[:prompts], parts):
        spare, rest = np.split(rest, [prompts // parts - len(own)])
        chosen += [own, spare]
    chosen_P = np.concatenate(chosen)
    rows_PG = chosen_P[:, None] * group_size + np.arange(group_size)
    return rows_PG.reshape(-1).astype(np.int32), np.repeat(signal_P[chosen_P], group_size)


ESTIMATORS = {
    "group": group,
    "leave_one_out": leave_one_out,
    "mean": mean,
    "reinforce_pp": lambda rewards_B, _, penalty_B=None: reinforce_pp(rewards_B, None, penalty_B),
}
