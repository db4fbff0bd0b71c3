"""Predicts which calls the current jobs will make next, from their workflows and from how earlier jobs went."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from runtime.events import CallPaused, Event, JobAdvanced, JobEnded

NEWEST_WEIGHT = 0.05
"""Weight of the newest value in a running mean."""


@dataclass
class _Progress:
    """A running job: its calls made so far, its open calls, and those certain to come (None if unknown), by seat.

    An open call that waits for a tool is in `paused` and not in `open`.
    """

    made: Counter[str] = field(default_factory=Counter)
    open: Counter[str] = field(default_factory=Counter)
    paused: Counter[str] = field(default_factory=Counter)
    ahead: Mapping[str, int] | None = None


class ExpectedRequests(Protocol):
    """The requests that engines can expect, by the name of the engine. Forecast describes the methods."""

    def open_calls(self) -> dict[str, int]: ...

    def soon(self, running: Mapping[str, float]) -> dict[str, float]: ...

    def coming(self) -> dict[str, float]: ...


class Forecast:
    """A listener that counts calls by engine: those open now, and those expected.

    Its callers first declare the seats with `seat`, then send it every event with `on_event`.
    """

    def __init__(self) -> None:
        self._engine_of: dict[str, str] = {}
        self._jobs: dict[str, _Progress] = {}
        self._open: Counter[str] = Counter()
        self._ahead: Counter[str] = Counter()
        self._paused: Counter[str] = Counter()
        self._unplanned: dict[str, _Progress] = {}
        self._mean_calls_of_job: dict[str, float] = {}
        self._mean_followers: dict[str, dict[str, float]] = defaultdict(dict)

    def seat(self, engine_of: Mapping[str, str]) -> None:
        """Declare seats and the engine that each one calls."""
        self._engine_of.update(engine_of)

    def on_event(self, event: Event) -> None:
        """Update the counts when a job starts, advances, waits for a tool or ends."""
        match event:
            case CallPaused():
                self._pause(event)
            case JobAdvanced():
                self._advance(event)
            case JobEnded():
                self._end(event.job)

    def open_calls(self) -> dict[str, int]:
        """Return the calls that are due and not answered, by engine. Calls that are about to be sent are included."""
        calls: dict[str, int] = defaultdict(int)
        for seat, count in self._open.items():
            calls[self._engine_of[seat]] += count
        return calls

    def soon(self, running: Mapping[str, float]) -> dict[str, float]:
        """Return the calls expected to follow directly on those running now, by engine.

        `running` is the fraction of each engine's open calls that run.
        """
        expected: dict[str, float] = defaultdict(float)
        for seat, count in self._open.items():
            for follower, mean in self._mean_followers[seat].items():
                expected[self._engine_of[follower]] += count * mean * running.get(self._engine_of[seat], 0.0)
        return expected

    def coming(self) -> dict[str, float]:
        """Return the calls that running jobs will make after their open ones, by engine. Calls in tools come back.

        A job whose workflow does not know its calls yet is expected to make as many as earlier jobs did on average.
        """
        expected: dict[str, float] = defaultdict(float)
        for seat, count in (self._ahead + self._paused).items():
            expected[self._engine_of[seat]] += count
        for progress in self._unplanned.values():
            for seat, mean in self._mean_calls_of_job.items():
                expected[self._engine_of[seat]] += max(mean - progress.made[seat], 0.0)
        return expected

    def _pause(self, event: CallPaused) -> None:
        progress = self._jobs.setdefault(event.job, _Progress())
        change = Counter({event.seat: 1 if event.paused else -1})
        for open_calls, paused in ((self._open, self._paused), (progress.open, progress.paused)):
            open_calls.subtract(change)
            paused.update(change)

    def _advance(self, event: JobAdvanced) -> None:
        progress = self._jobs.setdefault(event.job, _Progress())
        self._open.subtract(progress.open)
        self._ahead.subtract(progress.ahead or {})
        if event.replied:
            progress.open[event.replied] -= 1
            self._learn_followers(event.replied, event.due)
        progress.made.update(event.due)
        progress.open.update(event.due)
        progress.ahead = event.ahead
        self._open.update(progress.open)
        self._ahead.update(progress.ahead or {})
        if progress.ahead is None:
            self._unplanned[event.job] = progress
        else:
            self._unplanned.pop(event.job, None)

    def _learn_followers(self, replied: str, due: Mapping[str, int]) -> None:
        """Update how many calls to each seat follow on a reply of this one."""
        followers = self._mean_followers[replied]
        for seat in {*followers, *due}:
            followers[seat] = _updated_mean(followers.get(seat), due.get(seat, 0))

    def _end(self, job: str) -> None:
        progress = self._jobs.pop(job, None)
        if progress is None:
            return
        self._unplanned.pop(job, None)
        self._open.subtract(progress.open)
        self._paused.subtract(progress.paused)
        self._ahead.subtract(progress.ahead or {})
        for seat in {*self._mean_calls_of_job, *progress.made}:
            mean = self._mean_calls_of_job.get(seat)
            self._mean_calls_of_job[seat] = _updated_mean(mean, progress.made[seat])


def _updated_mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + NEWEST_WEIGHT * (newest - mean)
