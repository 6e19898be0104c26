"""How long runs last: Kaplan–Meier curves and log-rank tests over seeds, by `lifelines`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from sapo_jax.cli import missing


class Life(NamedTuple):
    """A run until it collapsed, or, if it did not, until it was last seen."""

    iterations: int
    collapsed: bool


def compare(groups: Mapping[str, Sequence[Life]]) -> dict[str, Any] | None:
    """Survival of each group, and how it differs from the first; None without lifelines.

    The curve is the share of runs that have not collapsed by an iteration, Π (1 − d/n) over the
    iterations at which d of the n runs still under way did, with its 95% interval (log −log, from
    Greenwood's variance). Two groups are compared by the log-rank test, χ² with one degree of
    freedom; all at once by its form for several groups. Both are asymptotic: of few seeds their p
    is rough.

    Source: Kaplan & Meier 1958; Mantel 1966; `lifelines`.

    Returns:
      ``p`` of all groups; and of each ``iteration``, ``share``, ``low``, ``high``, ``left`` (runs
      whose end was not seen, by the iteration at which they were last), ``median``, and ``p``. A p
      is None where no run collapsed, or there is nothing to compare.
    """
    try:
        from lifelines import KaplanMeierFitter
        from lifelines import statistics as tests
    except ImportError as error:
        logging.warning("No collapse curves: %s", missing(error))
        return None

    def p_of(*some: Sequence[Life]) -> float | None:
        each = [(life, k) for k, lives in enumerate(some) for life in lives]
        if len(some) < 2 or not any(life.collapsed for life, _ in each):
            return None
        lives, group = zip(*each, strict=True)
        times, events = zip(*lives, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(tests.multivariate_logrank_test(times, group, events).p_value)

    first, *_ = groups.values()
    curves = {}
    for name, lives in groups.items():
        times, events = zip(*lives, strict=True)
        with warnings.catch_warnings():  # of intervals that are not defined
            warnings.simplefilter("ignore")
            fitted = KaplanMeierFitter().fit(times, events)
        bounds = fitted.confidence_interval_survival_function_.fillna(1.0)
        curves[name] = {
            "iteration": [float(t) for t in fitted.survival_function_.index],
            "share": fitted.survival_function_.iloc[:, 0].tolist(),
            "low": bounds.iloc[:, 0].tolist(),
            "high": bounds.iloc[:, 1].tolist(),
            "left": sorted(t for t, collapsed in lives if not collapsed),
            "median": _finite(fitted.median_survival_time_),
            "p": None if lives is first else p_of(first, lives),
        }
    return {"p": p_of(*groups.values()), "groups": curves}


def _finite(value: float) -> float | None:
    return float(value) if value < float("inf") else None
