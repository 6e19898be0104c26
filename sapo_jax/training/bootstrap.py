"""Bootstrap intervals (Efron 1979), always with the same seed."""

from __future__ import annotations

import numpy as np


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


def percentiles(statistic_R: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle ``level`` of a statistic's resampled values."""
    low, high = np.quantile(statistic_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def counts(count: int, resamples: int) -> np.ndarray:
    """How often each of ``count`` things is drawn in each resample, i64[R, N]."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
