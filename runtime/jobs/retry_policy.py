"""Owns the rules by which a job is tried again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """The number of tries of a job, and the backoff before each.

    After an engine's error a job gets up to `retries` more tries. The first comes after `initial_backoff_s`, and each
    later backoff is twice as long, up to `backoff_max_s`. A job that has started `starts_max` times, retries apart,
    without ending probably crashes the runtime, and fails.
    """

    retries: int
    initial_backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    starts_max: int = 20

    def backoff_s(self, failures: int) -> float | None:
        """Return the seconds until the next try of a job that failed `failures` times before, None if it gets none."""
        if failures >= self.retries:
            return None
        return min(self.initial_backoff_s * 2.0**failures, self.backoff_max_s)

    def allows_start(self, starts: int) -> bool:
        """Return False if a job has started too often; `starts` counts the present start too."""
        return starts <= self.starts_max + self.retries
