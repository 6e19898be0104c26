"""What a minibatch shows: gates, ratios, sequences, the sampler's gap, lost numbers.

Every statistic is a sum over tokens or sequences that merges over micro-batches and devices.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sapo_jax import diagnostics, masked, objectives
from sapo_jax.objectives import Objective, Switch
from sapo_jax.objectives.gates import TokenInputs
from sapo_jax.objectives.ratios import bounded
from sapo_jax.types import Batch, Effective, Histogram, Max, Weighted

# Four bins a decade of the distance from log r = 0 and from w = 1: near the policy that sampled,
# where log r is 0.01, a smooth gate differs from 1 by 1e-5. 0 and 1 are in the middle of a bin, and
# so is w = 0, a token that is silenced.
_NEAR = np.geomspace(1e-6, 0.1, 21)
_FAR = np.geomspace(1e-5, 10, 25)
LOG_RATIO_EDGES = np.concatenate([-_FAR[::-1], _FAR]).astype(np.float32)
GATE_EDGES = np.concatenate(
    [[-1e-6, 1e-6], np.linspace(0.1, 0.8, 8), 1 - _NEAR[::-1], 1 + _NEAR, [1.2, 1.4, 1.6]]
).astype(np.float32)

RATIO_EDGES = np.linspace(0.4, 1.6, 49).astype(np.float32)

# Counts that become quantiles: on both sides of 0, 50 bins a decade, so that a bin is 5% wide.
_LEAST, _DECADES, _DECADE = 1e-8, 10, 50
_SIZES = np.geomspace(_LEAST, _LEAST * 10.0**_DECADES, _DECADES * _DECADE + 1)
QUANTILE_EDGES = np.concatenate([-_SIZES[::-1], _SIZES]).astype(np.float32)
QUANTILES = {  # of histogram/for/<key>
    "ratio/log": (0.01, 0.5, 0.99), "ratio/var": (0.5, 0.99),
    "ratio/d_log": (0.99,), "ratio/d_gate": (0.99,),
}  # fmt: skip
# Of minibatches behind the first, whose policy is the one that sampled.
OFF_POLICY = ("ratio/", "coefficient/", "histogram/ratio")

# What has to be finite for an update to be made, in the order in which it comes about.
STATIONS = ("reward", "old_logp", "ref_logp", "correction", "logits", "loss", "gradient")


def nonfinite(logp_BS: jnp.ndarray, batch: Batch) -> Max:
    """1 for each of the STATIONS up to the logits that is not finite where it counts, else 0."""
    inputs = (batch.token_advantages, batch.old_logp, batch.ref_logp, batch.weights, logp_BS)
    bad = [x is not None and jnp.any(batch.mask & ~jnp.isfinite(x)) for x in inputs]
    return Max(jnp.stack(bad).astype(jnp.float32))


def _counts(index: jnp.ndarray, mask: jnp.ndarray, edges: np.ndarray) -> Histogram:
    bins = len(edges) - 1
    flat = jnp.where(mask, jnp.clip(index, 0, bins - 1), bins).reshape(-1)
    counts = jnp.bincount(flat, length=bins + 1)[:bins].astype(jnp.float32)
    return Histogram(counts, jnp.asarray(edges))


def histogram(values: jnp.ndarray, mask: jnp.ndarray, edges: np.ndarray) -> Histogram:
    """Counts of the masked values between edges; what lies beyond is counted in the end bins."""
    return _counts(jnp.searchsorted(edges, values, side="right") - 1, mask, edges)


def for_quantiles(values: jnp.ndarray, mask: jnp.ndarray) -> Histogram:
    """Counts of the masked values between QUANTILE_EDGES, without a search."""
    decades = jnp.log10(jnp.maximum(jnp.abs(values), _LEAST) / _LEAST)
    size = jnp.ceil(decades * _DECADE).astype(jnp.int32)
    return _counts(_DECADES * _DECADE + jnp.where(values < 0, -size, size), mask, QUANTILE_EDGES)


def quantiles(terms: dict[str, Any]) -> dict[str, Any]:
    """The terms with numbers, such as ``ratio/var_p99``, in place of the counts for them."""
    found = dict(terms)
    for key, shares in QUANTILES.items():
        counts = found.pop(f"histogram/for/{key}")
        for share in shares:
            value = diagnostics.quantile(counts, share)
            found[f"{key}_p{round(100 * share):02d}"] = Weighted(value, jnp.ones_like(value))
    return found


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
    gate_BS = c_BS / inputs.ratio
    gap_BS = jnp.abs(logp_BS - batch.sampler_logp)
    terms = {
        "sampler/logp_gap_mean": masked.mean(gap_BS, batch.mask),
        "sampler/logp_gap_max": Max(jnp.max(jnp.where(batch.mask, gap_BS, -jnp.inf))),
    }
    mass_BS = jnp.abs(c_BS * inputs.advantages)
    for sign, side_BS in (("pos", inputs.advantages > 0), ("neg", inputs.advantages < 0)):
        chosen_BS = counted_BS & side_BS
        terms[f"histogram/log_ratio_{sign}"] = histogram(
            inputs.log_ratio, chosen_BS, LOG_RATIO_EDGES
        )
        terms[f"histogram/gate_{sign}"] = histogram(gate_BS, chosen_BS, GATE_EDGES)
        for place, there in (("below", inputs.log_ratio < 0), ("above", inputs.log_ratio > 0)):
            part = jnp.sum(masked.keep(mass_BS, chosen_BS & there))
            terms[f"coefficient/{sign}_{place}"] = Weighted(part, jnp.sum(mass_BS))
    terms |= _effective_updates(gate_BS, counted_BS, inputs.advantages > 0, batch)
    tau_BS = objectives.temperatures(objective, inputs.advantages)
    return terms | _ratios(inputs, tau_BS, batch)


def _effective_updates(gate_BS, counted_BS, gain_BS, batch: Batch) -> dict[str, Weighted]:
    """EUR: w = f′(r), averaged over the tokens of a prompt, then over prompts.

    Each token weighs 1 ÷ the number of its prompt's, which are those with A ≠ 0, or of one sign.
    """
    if batch.prompt_tokens is None:
        each = (counted_BS, counted_BS & gain_BS, counted_BS & ~gain_BS)
        ones = jnp.ones_like(gate_BS)
        all_BS, pos_BS, neg_BS = (masked.sequence_sum(ones, m, batch.segments) for m in each)
        own_BS = jnp.where(gain_BS, pos_BS, neg_BS)
    else:
        tokens = batch.prompt_tokens
        tokens_BS2 = tokens if tokens.ndim == 3 else tokens[:, None]
        all_BS, own_BS = (jnp.broadcast_to(tokens_BS2[..., i], gate_BS.shape) for i in (0, 1))
    one, terms = jnp.ones_like(gate_BS), {}
    for name, tokens_BS, mask_BS in (
        ("eur", all_BS, counted_BS),
        ("eur_pos", own_BS, counted_BS & gain_BS),
        ("eur_neg", own_BS, counted_BS & ~gain_BS),
    ):
        share_BS = masked.keep(masked.ratio(Weighted(one, tokens_BS)), mask_BS)
        terms[f"policy/{name}"] = Weighted(jnp.sum(share_BS * gate_BS), jnp.sum(share_BS))
    return terms


def _ratios(inputs: TokenInputs, tau_BS: jnp.ndarray, batch: Batch) -> dict[str, Any]:
    """Of the tokens' own ratios, whatever the objective's level; Var_i and D_i of sequences."""
    log_ratio_BS = bounded(inputs.logp - inputs.old_logp)
    r_BS, mask_BS = masked.keep(jnp.exp(log_ratio_BS), batch.mask), batch.mask
    tokens = jnp.sum(mask_BS, dtype=r_BS.dtype)
    found = diagnostics.sequences(log_ratio_BS, mask_BS, tau_BS, batch.segments)
    known = found.tokens > 0
    return {
        "histogram/ratio": histogram(r_BS, mask_BS, RATIO_EDGES),
        "ratio/ess": Effective(jnp.sum(r_BS), jnp.sum(r_BS**2), tokens),
        "histogram/for/ratio/log": for_quantiles(log_ratio_BS, mask_BS),
        "histogram/for/ratio/var": for_quantiles(found.variance, known),
        "histogram/for/ratio/d_log": for_quantiles(found.d_log, known),
        "histogram/for/ratio/d_gate": for_quantiles(found.d_gate, known),
        "ratio/var_mean": masked.mean(found.variance, known),
        "ratio/d_log_mean": masked.mean(found.d_log, known),
        "ratio/d_gate_mean": masked.mean(found.d_gate, known),
        "ratio/bound_mean": masked.mean(found.bound, known),
        "ratio/bound_broken": masked.mean((found.d_gate > found.bound).astype(r_BS.dtype), known),
    }
