"""Predicts when engines will be called next, from the running jobs and from how earlier jobs went.

A job calls one seat after the other. Which call follows on which, and how long calls take, is learned from earlier jobs
of the same kind, that is, of jobs whose workflow calls the same seats.
"""

import asyncio
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from runtime.events import CallPaused, Event, JobAdvanced, JobEnded

NEWEST_WEIGHT = 0.1
"""Weight of the newest value in a running mean."""
LIKELY = 0.5
"""Calls that follow with at least this probability are expected."""
UNKNOWN_CALL_S = 1.0
"""The expected duration of a call to a seat that has not replied yet."""


@dataclass
class _Kind:
    """The averages over jobs that call the same seats.

    - `followers`: how many calls to each seat follow on a reply of a seat, on average.
    - `lead_s`: the average time from a job's beginning to its first call of a seat.
    """

    followers: defaultdict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    lead_s: dict[str, float] = field(default_factory=dict)
    has_ended: bool = False


@dataclass
class _Job:
    """A running job: its kind, when its open calls of each seat were made (the oldest first), and its certain calls.

    `paused` counts the open calls that wait for a tool.
    """

    kind: frozenset[str]
    began_s: float
    since_s: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    paused: Counter[str] = field(default_factory=Counter)
    ahead: Mapping[str, int] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)


class ExpectedTimes(Protocol):
    """The times at which engines can expect requests, by the name of the engine. CallTimes describes the methods."""

    def next_call_s(self, absent: Collection[str] = ()) -> dict[str, float]: ...

    def lead_s(self) -> dict[str, float]: ...


class CallTimes:
    """A listener that predicts calls by engine.

    Its callers first declare the seats with `seat`, then send it every event with `on_event`. `clock` returns seconds;
    the default is the event loop's clock.
    """

    def __init__(self, clock: Callable[[], float] = lambda: asyncio.get_running_loop().time()) -> None:
        self._clock = clock
        self._engine_of: dict[str, str] = {}
        self._jobs: dict[str, _Job] = {}
        self._kinds: defaultdict[frozenset[str], _Kind] = defaultdict(_Kind)
        self._call_s: dict[str, float] = {}

    def seat(self, engine_of: Mapping[str, str]) -> None:
        """Declare seats and the engine that each one calls."""
        self._engine_of.update(engine_of)

    def on_event(self, event: Event) -> None:
        """Learn from a job that advances or ends."""
        match event:
            case JobAdvanced():
                self._advance(event)
            case CallPaused() if paused_job := self._jobs.get(event.job):
                paused_job.paused[event.seat] += 1 if event.paused else -1
            case JobEnded() if job := self._jobs.pop(event.job, None):
                self._kinds[job.kind].has_ended |= event.error is None

    def next_call_s(self, absent: Collection[str] = ()) -> dict[str, float]:
        """Return in how many seconds each engine will probably be called next. Leave out engines that no job will call.

        A call is expected to end when it has taken as long as earlier calls of its seat did on average. Calls of
        `absent` engines, which do not serve, count from now. A seat is expected to be called if its calls probably
        follow on the open ones, directly or not. Seats of which no job has shown that are expected after the next
        reply: those that a job is certain to call, and all seats of a job that is the first of its kind. A call that
        waits for a tool is expected back at any time.
        """
        now_s = self._clock()
        jobs_of: defaultdict[frozenset[str], list[_Job]] = defaultdict(list)
        for job in self._jobs.values():
            jobs_of[job.kind].append(job)
        by_engine: dict[str, float] = {}
        for kind, jobs in jobs_of.items():
            for seat, seconds in self._next_of_kind(kind, jobs, now_s, absent).items():
                engine = self._engine_of[seat]
                by_engine[engine] = min(seconds, by_engine.get(engine, math.inf))
        return by_engine

    def lead_s(self) -> dict[str, float]:
        """Return how long after the beginning of a job its first call of each engine comes, on average.

        If several kinds of jobs call an engine, the shortest average counts. Leave out engines that no job has called.
        """
        by_engine: dict[str, float] = {}
        for kind in self._kinds.values():
            for seat, seconds in kind.lead_s.items():
                engine = self._engine_of[seat]
                by_engine[engine] = min(seconds, by_engine.get(engine, math.inf))
        return by_engine

    def _next_of_kind(
        self, name: frozenset[str], jobs: Collection[_Job], now_s: float, absent: Collection[str]
    ) -> dict[str, float]:
        """Return when jobs of one kind will call seats next, in seconds from now."""
        kind = self._kinds[name]
        ends_s: dict[str, float] = {}
        calls: defaultdict[str, int] = defaultdict(int)
        for job in jobs:
            for seat, since_s in job.since_s.items():
                if since_s:
                    since = now_s if self._engine_of[seat] in absent else since_s[0]
                    left_s = max(since + self._call_s.get(seat, UNKNOWN_CALL_S) - now_s, 0.0)
                    ends_s[seat] = min(left_s, ends_s.get(seat, left_s))
                    calls[seat] += len(since_s)
        called_s = self._follow(kind, ends_s, calls)
        expected = {seat for job in jobs for seat, count in job.ahead.items() if count > 0}
        if not kind.has_ended:
            expected |= name
        shown = {seat for followers in kind.followers.values() for seat in followers}
        soonest_s = min(ends_s.values(), default=0.0)
        in_tools = {seat for job in jobs for seat, count in job.paused.items() if count > 0}
        return {**dict.fromkeys(expected - shown - calls.keys(), soonest_s), **called_s, **dict.fromkeys(in_tools, 0.0)}

    def _follow(self, kind: _Kind, ends_s: Mapping[str, float], calls: Mapping[str, int]) -> dict[str, float]:
        """Return when seats will be called, given when a call of each seat ends: a search for the shortest paths."""
        called_s: dict[str, float] = {}
        ends = [(seconds, seat, calls[seat]) for seat, seconds in ends_s.items()]
        heapq.heapify(ends)
        while ends:
            ended_s, seat, count = heapq.heappop(ends)
            for follower, mean in kind.followers.get(seat, {}).items():
                likely = 1 - (1 - min(mean, 1.0)) ** count >= LIKELY
                if likely and ended_s < called_s.get(follower, math.inf):
                    called_s[follower] = ended_s
                    heapq.heappush(ends, (ended_s + self._call_s.get(follower, UNKNOWN_CALL_S), follower, 1))
        return called_s

    def _advance(self, event: JobAdvanced) -> None:
        now_s = self._clock()
        job = self._jobs.setdefault(event.job, _Job(event.seats, now_s))
        kind = self._kinds[job.kind]
        if event.replied:
            first = event.replied not in kind.followers
            followers = kind.followers[event.replied]
            for seat in {*followers, *event.due}:
                followers[seat] = _updated(followers.get(seat, None if first else 0), event.due.get(seat, 0))
            if since_s := job.since_s[event.replied]:
                self._call_s[event.replied] = _updated(self._call_s.get(event.replied), now_s - since_s.popleft())
        for seat, count in event.due.items():
            job.since_s[seat].extend([now_s] * count)
            if seat not in job.called:
                job.called.add(seat)
                kind.lead_s[seat] = _updated(kind.lead_s.get(seat), now_s - job.began_s)
        job.ahead = event.ahead or {}


def _updated(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + NEWEST_WEIGHT * (newest - mean)
