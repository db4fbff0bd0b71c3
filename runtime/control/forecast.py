"""What the jobs under way will ask of the engines next: from their workflows, and from how jobs went before."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.events import Event, JobAdvanced, JobEnded

FORGETTING = 0.05
"""The weight of the newest in a running mean."""


@dataclass
class _Progress:
    """A job under way: its calls so far and now, by seat, and what is certain to come (None: not known)."""

    made: Counter[str] = field(default_factory=Counter)
    open: Counter[str] = field(default_factory=Counter)
    ahead: Mapping[str, int] | None = None


class Forecast:
    """A listener. Counts of requests by engine; `soon` is what follows directly on the calls that run, `coming`
    all that the jobs under way will still make, as far as they know it, else as jobs made on average."""

    def __init__(self) -> None:
        self._engine_of: dict[str, str] = {}
        self._jobs: dict[str, _Progress] = {}
        self._open: Counter[str] = Counter()
        self._ahead: Counter[str] = Counter()
        self._unplanned: dict[str, _Progress] = {}
        self._calls_of_a_job: dict[str, float] = {}
        self._follow: dict[str, dict[str, float]] = defaultdict(dict)

    def seat(self, engine_of: Mapping[str, str]) -> None:
        """Make seats known, and the engine that each calls on."""
        self._engine_of.update(engine_of)

    def hear(self, event: Event) -> None:
        """Take note of a job that begins, goes on or ends."""
        match event:
            case JobAdvanced():
                self._advance(event)
            case JobEnded():
                self._end(event.job)

    def open_calls(self) -> dict[str, int]:
        """Calls that are due and not answered, by engine; those that are about to be made are among them."""
        calls: dict[str, int] = defaultdict(int)
        for seat, count in self._open.items():
            calls[self._engine_of[seat]] += count
        return calls

    def soon(self, running: Mapping[str, float]) -> dict[str, float]:
        """Calls that will be due when those that run now are answered, by engine; `running` is the part of each
        engine's calls that does."""
        expected: dict[str, float] = defaultdict(float)
        for seat, count in self._open.items():
            for follower, mean in self._follow[seat].items():
                expected[self._engine_of[follower]] += count * mean * running.get(self._engine_of[seat], 0.0)
        return expected

    def coming(self) -> dict[str, float]:
        """Calls that jobs under way will make after those that are open, by engine."""
        expected: dict[str, float] = defaultdict(float)
        for seat, count in self._ahead.items():
            expected[self._engine_of[seat]] += count
        for progress in self._unplanned.values():
            for seat, mean in self._calls_of_a_job.items():
                expected[self._engine_of[seat]] += max(mean - progress.made[seat], 0.0)
        return expected

    def _advance(self, event: JobAdvanced) -> None:
        progress = self._jobs.setdefault(event.job, _Progress())
        self._open.subtract(progress.open)
        self._ahead.subtract(progress.ahead or {})
        if event.replied:
            progress.open[event.replied] -= 1
            self._learn(event.replied, event.due)
        progress.made.update(event.due)
        progress.open.update(event.due)
        progress.ahead = event.ahead
        self._open.update(progress.open)
        self._ahead.update(progress.ahead or {})
        if progress.ahead is None:
            self._unplanned[event.job] = progress
        else:
            self._unplanned.pop(event.job, None)

    def _learn(self, replied: str, due: Mapping[str, int]) -> None:
        """How many calls to each seat follow on a reply."""
        follow = self._follow[replied]
        for seat in {*follow, *due}:
            follow[seat] = _mean(follow.get(seat), due.get(seat, 0))

    def _end(self, job: str) -> None:
        progress = self._jobs.pop(job, None)
        if progress is None:
            return
        self._unplanned.pop(job, None)
        self._open.subtract(progress.open)
        self._ahead.subtract(progress.ahead or {})
        for seat in {*self._calls_of_a_job, *progress.made}:
            self._calls_of_a_job[seat] = _mean(self._calls_of_a_job.get(seat), progress.made[seat])


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + FORGETTING * (new - before)
