"""Aggregations: from per-token values to one number, by sums that merge before they are divided."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sapo_jax import masked
from sapo_jax.types import Weighted

AGGREGATIONS = {
    "seq_mean": "Σ_i (1/|y_i|) Σ_t / number of sequences",
    "token_mean": "Σ_i Σ_t / number of tokens",
    "const_len": "Σ_i Σ_t / (number of sequences · max_length)",
    "seq_sum": "Σ_i Σ_t / number of sequences",
}


def divisor(
    mask_BT: jax.Array, aggregation: str, segments_BT: jax.Array | None, dtype: Any
) -> jax.Array | None:
    """What each token's value is divided by before the sum, f[B, T]: |y_i| or nothing (None)."""
    if aggregation != "seq_mean":
        return None
    return masked.sequence_sum(jnp.ones(mask_BT.shape, dtype), mask_BT, segments_BT)


def aggregate(
    values_BT: jax.Array,
    mask_BT: jax.Array,
    aggregation: str,
    *,
    segments_BT: jax.Array | None = None,
    max_length: jax.Array | float | None = None,
) -> Weighted:
    """One of AGGREGATIONS, not divided yet: parts of a batch add up before the one division."""
    values_BT = masked.keep(values_BT, mask_BT)
    length_BT = divisor(mask_BT, aggregation, segments_BT, values_BT.dtype)
    if length_BT is not None:
        values_BT = masked.ratio(Weighted(values_BT, length_BT))
    total = jnp.sum(values_BT)
    if aggregation == "token_mean":
        return Weighted(total, jnp.sum(mask_BT, dtype=total.dtype))
    sequences = masked.sequence_count(mask_BT, segments_BT).astype(total.dtype)
    return Weighted(total, sequences * max_length if aggregation == "const_len" else sequences)
