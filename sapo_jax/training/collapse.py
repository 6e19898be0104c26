"""Collapse: since when a run has lost what it had learnt, or its variety, without a recovery."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

RULES = {"reward": ("reward",), "entropy": ("entropy",), "either": ("reward", "entropy")}
METRICS = {"reward": "reward/accuracy", "entropy": "policy/entropy"}


class _Level:
    """Since which iteration the running mean of a metric is below a share of its reference.

    The reference is the best running mean so far, which counts from ``least`` on, or the first.
    """

    def __init__(self, share: float, window: int, least: float | None):
        self._share, self._least, self._reference = share, least, -math.inf
        self._last: collections.deque[float] = collections.deque(maxlen=window)
        self.since = 0

    def add(self, iteration: int, value: float | None) -> None:
        """An iteration more; what was not measured, or is not finite, changes nothing."""
        if value is None or not math.isfinite(value):
            return
        self._last.append(value)
        if len(self._last) < self._last.maxlen:
            return
        mean = math.fsum(self._last) / len(self._last)
        if self._least is not None or self._reference == -math.inf:
            self._reference = max(self._reference, mean)
        counts = self._least is None or self._reference >= self._least
        down = counts and mean < self._share * self._reference
        self.since = (self.since or iteration) if down else 0


class Collapse:
    """Whether a run has collapsed, as its records so far show it.

    With m the mean of the last ``window`` iterations, a run is down

    - by ``reward`` where m of reward/accuracy is below ``reward`` times its best so far, which is
      ``least`` or more;
    - by ``entropy`` where m of policy/entropy is below ``entropy`` times its first. Near the
      ceiling of a task this is success; before it, the end of exploration.

    It collapsed in the iteration since which it is down without a break.

    Args:
      rule: the fields of config.collapse.
      records: of the iterations so far.
    """

    def __init__(self, rule: Mapping[str, Any], records: Iterable[Mapping[str, Any]] = ()):
        window = rule["window"]
        self._levels = {
            "reward": _Level(rule["reward"], window, rule["least"]),
            "entropy": _Level(rule["entropy"], window, None),
        }
        self._kinds = RULES[rule["rule"]]
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """An iteration more; the evaluation before the first is none."""
        if record["iteration"] > 0:
            for kind, level in self._levels.items():
                level.add(record["iteration"], record.get(METRICS[kind]))

    def since(self, *kinds: str) -> int:
        """The iteration of the collapse, by some of the kinds or those of the rule; 0: none."""
        found = (self._levels[kind].since for kind in kinds or self._kinds)
        return min(filter(None, found), default=0)
