"""How much each adapter is asked for: mean requests in flight, as two moving averages.

A slow average ranks the many cold adapters without noise; a fast one sees a rush within seconds. Their maximum is the
demand: quick to rise, slow to fall. The fast one counts only above one request in flight, since below that a single
request looks like a rush. Rows are the adapter rows of the Placement.
"""

import math
from collections.abc import Sequence

import numpy as np

RUSH = 1.0
FORGET = 1e-6


class Demand:
    """Two exponential averages per adapter row; time is given by the caller, so that it can be replayed."""

    def __init__(self, fast_half_life_s: float = 5.0, slow_half_life_s: float = 60.0) -> None:
        assert 0 < fast_half_life_s <= slow_half_life_s, "half-lives must be positive and ordered"
        self._rates = (math.log(2) / fast_half_life_s, math.log(2) / slow_half_life_s)
        self._sums = [np.zeros(0), np.zeros(0)]
        self._at_s: float | None = None
        self._born_s = 0.0

    def observe(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """Adds time in flight (request-seconds) spent since the last `level`, per adapter row."""
        if not len(rows):
            return
        at, add = np.asarray(rows), np.asarray(seconds, dtype=np.float64)
        self._grow(int(at.max()) + 1)
        for sums in self._sums:
            np.add.at(sums, at, add)

    def _grow(self, size: int) -> None:
        for i, sums in enumerate(self._sums):
            if size > len(sums):
                self._sums[i] = np.zeros(max(2 * len(sums), size))
                self._sums[i][: len(sums)] = sums

    def level(self, now_s: float, size: int) -> np.ndarray:
        """(size,) mean requests in flight per adapter row, at time `now_s`.

        While the averages are younger than their half-life they are scaled up to what they would reach.
        """
        if self._at_s is None:
            self._at_s = self._born_s = now_s
        passed_s, self._at_s = max(0.0, now_s - self._at_s), max(now_s, self._at_s)
        age_s = max(1.0, self._at_s - self._born_s)
        levels = []
        for sums, rate in zip(self._sums, self._rates, strict=True):
            sums *= math.exp(-rate * passed_s)
            level = np.zeros(size)
            known = min(size, len(sums))
            level[:known] = sums[:known] * (rate / (1 - math.exp(-rate * age_s)))
            levels.append(level)
        fast, slow = levels
        demand = np.maximum(slow, np.where(fast > RUSH, fast, 0.0))
        return np.where(demand > FORGET, demand, 0.0)

    def move(self, source: int, target: int | None) -> None:
        """Gives the demand of one row to another (a new version of the adapter), or forgets it."""
        self._grow(1 + max(source, target or 0))
        for sums in self._sums:
            value, sums[source] = sums[source], 0.0
            if target is not None:
                sums[target] += value
