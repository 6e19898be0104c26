"""Bootstrap intervals (Efron 1979), always with the same seed; of verdicts alone Wilson's."""

from __future__ import annotations

import math

import numpy as np

Z = 1.959964  # standard deviations of a normal distribution that hold 95% of it


def interval(*sets: np.ndarray, level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Percentile interval of the mean of values f[N], or of the mean of several sets' means.

    Of few values it is too narrow: for normal ones a level of 95% covers 81% with 4 of them, 89%
    with 8.
    """
    rng, total_R = np.random.default_rng(0), np.zeros(resamples)
    for values_N in sets:
        draws = rng.integers(0, len(values_N), (resamples, len(values_N)))
        total_R += values_N[draws].mean(-1)
    return percentiles(total_R / len(sets), level)


def of_shares(*sets: np.ndarray) -> tuple[float, float]:
    """As `interval`, of values f[N] in [0, 1]; Wilson's (1927) where resampling tells too little.

    That is where all values are 0 or 1, or the same. Wilson's takes a value for one throw of a coin
    that shows their mean, which varies no less than any value in [0, 1].
    """
    if not all(np.isin(x, (0, 1)).all() or np.ptp(x) == 0 for x in sets):
        return interval(*sets)
    mean = float(np.mean([x.mean() for x in sets]))
    count = len(sets) ** 2 / sum(1 / len(x) for x in sets)
    centre, spread = mean + Z**2 / (2 * count), mean * (1 - mean) / count + (Z / (2 * count)) ** 2
    low, high = ((centre + end * Z * math.sqrt(spread)) / (1 + Z**2 / count) for end in (-1, 1))
    return min(mean, max(0.0, low)), max(mean, min(1.0, high))


def percentiles(statistic_R: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle ``level`` of a statistic's resampled values."""
    low, high = np.quantile(statistic_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def counts(count: int, resamples: int) -> np.ndarray:
    """How often each of ``count`` things is drawn in each resample, i64[R, N]."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
