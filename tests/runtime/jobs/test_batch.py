"""Percentiles of job times."""

import pytest

from runtime.jobs.batch import percentile


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [(1, 50, 1), (1, 99, 1), (2, 50, 1), (4, 50, 2), (100, 90, 90), (100, 99, 99), (10, 99, 10)],
)
def test_percentile_is_the_nearest_rank(count: int, percent: float, rank: int) -> None:
    assert percentile([float(n) for n in range(1, count + 1)], percent) == rank
