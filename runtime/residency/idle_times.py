"""Remembers how long an engine was idle between its calls, to predict when it will be called again."""

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

LATEST = 200
"""An engine remembers this many idle times."""
ENOUGH = 5
"""Policies conclude nothing from fewer idle times."""


class IdleTimes:
    """The latest idle times of one engine, in seconds: from the end of its last call to the next call."""

    def __init__(self, seconds: Sequence[float] = ()) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        for each in seconds:
            self.add(each)

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, seconds: float) -> None:
        """Remember another idle time, and forget the oldest one if there are too many."""
        if len(self._latest) == LATEST:
            self._sorted.remove(self._latest.popleft())
        self._latest.append(seconds)
        insort(self._sorted, seconds)

    def quantile(self, fraction: float, longer_than_s: float = 0.0) -> float:
        """Return the quantile of those idle times that were longer than the given one. Infinite if there is none."""
        first = bisect_right(self._sorted, longer_than_s)
        longer = len(self._sorted) - first
        if not longer:
            return math.inf
        return self._sorted[first + min(int(fraction * longer), longer - 1)]

    def cheapest_stay_s(self, wake_cost_s: float) -> float | None:
        """Return how long to stay awake without calls, by what would have cost the least over the remembered times.

        Staying costs its time. A call that comes later costs `wake_cost_s`. The best time is 0 or one of the remembered
        times, because only then the costs fall. Return None if fewer than ENOUGH times were longer than the best one:
        too little is known about what comes after it.
        """
        stayed_s, count = 0.0, len(self._sorted)
        best, best_s, least = 0, 0.0, count * wake_cost_s
        for index, idle_s in enumerate(self._sorted, start=1):
            stayed_s += idle_s
            cost = stayed_s + (count - index) * (idle_s + wake_cost_s)
            if cost < least:
                best, best_s, least = index, idle_s, cost
        return best_s if count - best >= ENOUGH else None
