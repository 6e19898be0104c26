"""From judged rows to what an update takes: advantages, KL in the reward, sampler corrections."""

from __future__ import annotations

import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapo_jax import advantages, corrections, masked
from sapo_jax.objectives.kl import sequence_kl
from sapo_jax.parallel import sharding
from sapo_jax.types import Batch, Weighted


@partial(jax.jit, static_argnames=("parts", "mesh"))
def split_rows(batch: Batch, parts: int, mesh: Mesh | None = None) -> tuple[Batch, ...]:
    """Rows in their order as minibatches of one size, each split over all of a mesh."""
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    minibatches = tuple(jax.tree.map(operator.itemgetter(i), pieces) for i in range(parts))
    return sharding.constrain(minibatches, mesh, sharding.spec("rows"))


@partial(jax.jit, static_argnames="mesh")
def select_rows(
    parts: tuple[Batch, ...], rows_B: jax.Array, signal_B: jax.Array, mesh: Mesh | None = None
) -> Batch:
    """Some rows of several batches as one; those without a signal count in no denominator."""
    every = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    images, every = every.images, every.replace(images=None)
    chosen = jax.tree.map(lambda x: x[rows_B], every)
    if images is not None:  # rows of a prompt stay together
        size = len(every.tokens) // len(images.grids)
        chosen = chosen.replace(images=jax.tree.map(lambda x: x[rows_B[::size] // size], images))
    chosen = chosen.replace(mask=chosen.mask & signal_B[:, None])
    return sharding.constrain(chosen, mesh, sharding.spec("rows"))


def _prompt_tokens(batch: Batch, group_size: int) -> jax.Array:
    """See `Batch.prompt_tokens`, f32[B, 2]."""
    tokens_B = jnp.sum(batch.mask, -1, dtype=jnp.float32) * (batch.advantages != 0)
    gain_B = batch.advantages > 0

    def of_prompt(x_B):
        return jnp.repeat(jnp.sum(x_B.reshape(-1, group_size), -1), group_size)

    all_B, pos_B = of_prompt(tokens_B), of_prompt(tokens_B * gain_B)
    return jnp.stack([all_B, jnp.where(gain_B, pos_B, all_B - pos_B)], -1)


@partial(jax.jit, static_argnames=("estimator", "group_size", "kl", "correction", "parts", "mesh"))
def make_minibatches(
    batch: Batch,
    rewards_B: jax.Array,
    kl_coef: jax.Array | float,
    bounds: dict[str, float],
    *,
    estimator: str,
    group_size: int,
    kl: str,
    correction: str,
    parts: int,
    mesh: Mesh | None = None,
) -> tuple[tuple[Batch, ...], dict[str, jax.Array]]:
    """Minibatches with advantages and weights.

    A = estimator(R − kl_coef · Σ_t KL_t), the sum over the completion, at π_old; equality and
    scale are decided on R (see `advantages`).

    Args:
      batch: an iteration's rows with their log-probabilities; its advantages are not looked at.
      rewards_B: f[B].
      kl_coef: weight of the KL in the reward; matters where the batch has ``ref_logp``.
      bounds: of the correction, see `corrections.bounds_of`.
      estimator: a name in `advantages.ESTIMATORS`.
      group_size: G.
      kl: the KL's estimator, see `objectives.kl`.
      correction: a name in `corrections.CORRECTIONS`, or "none".
      parts: minibatches.
      mesh: over which each of them is split.

    Returns:
      (minibatches, metrics): ``reward/kl``, ``correction/…``, where there are any; NaN where no
      token counts.
    """
    metrics, penalty_B = {}, None
    if batch.ref_logp is not None:
        kl_B = sequence_kl(batch.old_logp, batch.ref_logp, batch.mask, kl)
        penalty_B = kl_coef * kl_B
        rows = jnp.sum(batch.mask.any(-1), dtype=kl_B.dtype)
        metrics["reward/kl"] = masked.ratio(Weighted(jnp.sum(kl_B), rows))
    advantages_B = advantages.ESTIMATORS[estimator](rewards_B, group_size, penalty_B)
    batch = batch.replace(advantages=advantages_B)
    batch = batch.replace(prompt_tokens=_prompt_tokens(batch, group_size))
    if correction != "none":
        weights_BS, cut = corrections.weights(
            correction, batch.old_logp, batch.sampler_logp, batch.mask,
            segments_BT=batch.segments, **bounds,
        )  # fmt: skip
        batch, metrics = batch.replace(weights=weights_BS), metrics | cut
    counted = batch.mask.any()  # 0 would read as a measurement
    metrics = {key: jnp.where(counted, value, jnp.nan) for key, value in metrics.items()}
    return split_rows(batch, parts, mesh), metrics
