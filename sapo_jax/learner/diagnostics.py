"""What a minibatch shows: histograms by the sign of the advantage, sampler gap, lost numbers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sapo_jax import masked, objectives
from sapo_jax.objectives import Objective, Switch
from sapo_jax.types import Batch, Histogram, Max

# Four bins a decade of the distance from log r = 0 and from w = 1: near the policy that sampled,
# where log r is 0.01, a smooth gate differs from 1 by 1e-5. 0 and 1 are in the middle of a bin, and
# so is w = 0, a token that is silenced.
_NEAR = np.geomspace(1e-6, 0.1, 21)
_FAR = np.geomspace(1e-5, 10, 25)
LOG_RATIO_EDGES = np.concatenate([-_FAR[::-1], _FAR]).astype(np.float32)
GATE_EDGES = np.concatenate(
    [[-1e-6, 1e-6], np.linspace(0.1, 0.8, 8), 1 - _NEAR[::-1], 1 + _NEAR, [1.2, 1.4, 1.6]]
).astype(np.float32)

# What has to be finite for an update to be made, in the order in which it comes about.
STATIONS = ("reward", "old_logp", "ref_logp", "correction", "logits", "loss", "gradient")


def nonfinite(logp_BS: jnp.ndarray, batch: Batch) -> Max:
    """1 for each of the STATIONS up to the logits that is not finite where it counts, else 0."""
    inputs = (batch.token_advantages, batch.old_logp, batch.ref_logp, batch.weights, logp_BS)
    bad = [x is not None and jnp.any(batch.mask & ~jnp.isfinite(x)) for x in inputs]
    return Max(jnp.stack(bad).astype(jnp.float32))


def histogram(values: jnp.ndarray, mask: jnp.ndarray, edges: np.ndarray) -> Histogram:
    """Counts of the masked values between edges; what lies beyond is counted in the end bins."""
    bins = len(edges) - 1
    index = jnp.clip(jnp.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    flat = jnp.where(mask, index, bins).reshape(-1)
    counts = jnp.bincount(flat, length=bins + 1)[:bins].astype(jnp.float32)
    return Histogram(counts, jnp.asarray(edges))


def token_terms(
    objective: Objective | Switch, logp_BS: jnp.ndarray, batch: Batch
) -> dict[str, Any]:
    """Mergeable statistics of a minibatch's tokens; logp_BS carries no gradient.

    The sampler's gap |log π_learner − log π_sampler| means what it says only before the first
    update of an iteration, when both have the same parameters.
    """
    inputs, _ = objectives.token_inputs(
        objective, logp_BS, batch.old_logp, batch.advantages, batch.mask, batch.segments
    )
    c_BS, counted_BS = objectives.coefficients(objective, inputs, batch.mask)
    gate_BS = c_BS / jnp.exp(inputs.log_ratio)
    gap_BS = jnp.abs(logp_BS - batch.sampler_logp)
    terms = {
        "sampler/logp_gap_mean": masked.mean(gap_BS, batch.mask),
        "sampler/logp_gap_max": Max(jnp.max(jnp.where(batch.mask, gap_BS, -jnp.inf))),
    }
    for sign, side_BS in (("pos", inputs.advantages > 0), ("neg", inputs.advantages < 0)):
        chosen_BS = counted_BS & side_BS
        terms[f"histogram/log_ratio_{sign}"] = histogram(
            inputs.log_ratio, chosen_BS, LOG_RATIO_EDGES
        )
        terms[f"histogram/gate_{sign}"] = histogram(gate_BS, chosen_BS, GATE_EDGES)
    return terms
