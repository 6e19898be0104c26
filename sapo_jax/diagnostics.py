"""How far sequences are from the policy that sampled them, Var_i and D_i; quantiles of counts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.types import Histogram, Weighted


class Sequences(NamedTuple):
    """Statistics of each sequence: f[B], or f[B, T + 1] by the ids of packed segments.

    Attributes:
      tokens: how many it has; 0 where there is no sequence, and then so are the others.
      variance: Var_i = mean_t (z_t − μ_i)² of its log-ratios z with their mean μ_i.
      d_log: D_i = |mean_t g(z_t) − g(μ_i)|, g(z) = sech²(τz/2).
      d_gate: the same with the gate in use, g(r_t − 1), in place of g(z_t).
      bound: τ²/4 · Var_i, which d_log does not exceed.
    """

    tokens: jax.Array
    variance: jax.Array
    d_log: jax.Array
    d_gate: jax.Array
    bound: jax.Array


def sequences(
    log_ratio_BT: jax.Array,
    mask_BT: jax.Array,
    tau: jax.Array | float,
    segments_BT: jax.Array | None = None,
) -> Sequences:
    """Var_i and D_i of each sequence, and their bound (arXiv 2511.20347, Eq. 18-21).

    Args:
      log_ratio_BT: f[B, T], log π_θ − log π_old of each token.
      mask_BT: bool[B, T].
      tau: of the gate, a scalar, f[B, 1], or f[B, T]; one value in each sequence.
      segments_BT: i32[B, T] of packed rows.
    """
    z_BT = masked.keep(log_ratio_BT, mask_BT)
    first = jnp.stack([z_BT, jnp.ones_like(z_BT)], -1)
    first = masked.total_by_sequence(first, mask_BT, segments_BT)
    mean, tokens = masked.ratio(Weighted(first[..., 0], first[..., 1])), first[..., 1]
    mean_BT = masked.at_tokens(mean, segments_BT)
    square_BT = (z_BT - mean_BT) ** 2

    def opened(x):  # 1 − g(x): near 0, where 1 − g would be rounding
        return jnp.tanh(tau * x / 2) ** 2

    each = (
        square_BT,
        opened(z_BT) - opened(mean_BT),
        opened(jnp.expm1(z_BT)) - opened(mean_BT),
        tau**2 / 4 * square_BT,
    )
    totals = masked.total_by_sequence(jnp.stack(each, -1), mask_BT, segments_BT)
    variance, d_log, d_gate, bound = jnp.moveaxis(
        masked.ratio(Weighted(totals, tokens[..., None])), -1, 0
    )
    return Sequences(tokens, variance, jnp.abs(d_log), jnp.abs(d_gate), bound)


def sequence_statistics(
    log_ratio_BT: jax.Array, mask_BT: jax.Array, tau: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Var_i, D_i of the gate on log r, D_i of the gate in use) of each row, f[B] each.

    See `Sequences`; rows without tokens have 0. Args as for `sequences`, τ a scalar, f[B], or
    f[B, T].
    """
    if jnp.ndim(tau) == 1:
        tau = jnp.asarray(tau)[:, None]
    found = sequences(jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), tau)
    return found.variance, found.d_log, found.d_gate


def quantile(histogram: Histogram, share: float) -> jax.Array:
    """The value below which that share of what was counted lies, within its bin by proportion.

    NaN where nothing was counted.
    """
    counts, edges = histogram.counts, histogram.edges
    cumulative = jnp.cumsum(counts)
    target = share * cumulative[-1]
    at = jnp.sum(cumulative < target)
    part = masked.ratio(Weighted(target - (cumulative[at] - counts[at]), counts[at]))
    value = edges[at] + part * (edges[at + 1] - edges[at])
    return jnp.where(cumulative[-1] > 0, value, jnp.nan)
