"""Comparisons over shared seeds: intervals, exact tests, effect sizes, Holm's correction."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sapo_jax.report.sweep_stats import mean_of
from sapo_jax.training import bootstrap

EXACT = 16  # pairs up to which every assignment of signs is tried
RESAMPLES = 2**EXACT
LEVEL = 0.05

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclasses.dataclass(frozen=True)
class Effect:
    """A mean over seeds, of differences by seed where two settings are compared.

    Attributes:
      seeds: how many.
      mean, low, high: with its 95% bootstrap interval over seeds; no interval of fewer than 3.
      p: of the two-sided sign-flip test that the mean is 0.
      size: mean ÷ standard deviation over the seeds; None where that is 0.
    """

    seeds: int
    mean: float
    low: float | None
    high: float | None
    p: float
    size: float | None


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided p of a mean of 0, from all assignments of signs; of RESAMPLES ones beyond EXACT.

    Source: Fisher 1935, section 21. With n values no p is below 2^(1−n).
    """
    x_N = np.asarray(values, float)
    if len(x_N) <= EXACT:
        signs_RN = np.array(list(itertools.product((1, -1), repeat=len(x_N))))
    else:
        signs_RN = np.random.default_rng(0).choice((1, -1), (RESAMPLES, len(x_N)))
        signs_RN[0] = 1
    means_R = np.abs(signs_RN @ x_N)
    return float(np.mean(means_R >= np.abs(x_N.sum()) * (1 - 1e-12)))


def effect(values: Sequence[float]) -> Effect:
    """Of one number a seed."""
    x_N = np.asarray(values, float)
    spread = float(np.std(x_N, ddof=1)) if len(x_N) > 1 else 0.0
    size = float(x_N.mean()) / spread if spread else None
    return Effect(len(x_N), **mean_of(x_N), p=sign_flip(x_N), size=size)


def difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Effect:
    """Of the seeds that both have, value − reference."""
    return effect([values[seed] - reference[seed] for seed in values if seed in reference])


def hierarchical(draws: Sequence[Sequence[float]], points: Sequence[float]) -> Effect:
    """Of estimates that have an error of their own: seeds are drawn, then a draw of each.

    Args:
      draws: resampled values of each seed's estimate.
      points: the estimates.
    """
    found, count = effect(points), len(points)
    if found.low is None:
        return found
    rng = np.random.default_rng(0)  # seeds are drawn as `bootstrap.interval` draws them
    seeds_RN = rng.integers(0, count, (2000, count))
    drawn_RN = np.array([
        [draws[s][rng.integers(len(draws[s]))] for s in row] for row in seeds_RN
    ])  # fmt: skip
    low, high = bootstrap.percentiles(drawn_RN.mean(1))
    return dataclasses.replace(found, low=low, high=high)


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """Adjusted p of a family of tests (Holm 1979): the k-th smallest times as many as remain."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - k) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def verdict(found: Effect, p: float, claimed: int) -> str:
    """Of a claim that the mean is above 0 (claimed = 1), or below (−1).

    Supported where the interval is on the claimed side of 0 and the adjusted p below LEVEL,
    contradicted where it is on the other side with such a p, else undecided.
    """
    if found.low is None or found.high is None or p >= LEVEL or found.low <= 0 <= found.high:
        return UNDECIDED
    return SUPPORTED if np.sign(found.mean) == np.sign(claimed) else CONTRADICTED
