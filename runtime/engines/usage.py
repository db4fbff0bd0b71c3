"""What an engine's memory and time are spent on: a share for every request in flight.

At every moment an engine's memory counts to the requests that it has in flight, in equal parts; with none in flight it
is idle. So the integral of (bytes / requests in flight) over time is kept once, and what one request was charged is
its value at the request's end less that at its start.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Charge:
    """What was charged: bytes held times seconds, and seconds of the whole engine."""

    byte_seconds: float = 0.0
    engine_seconds: float = 0.0

    def __sub__(self, other: "Charge") -> "Charge":
        return Charge(self.byte_seconds - other.byte_seconds, self.engine_seconds - other.engine_seconds)


@dataclass
class Usage:
    """What one seat used in a job, summed over calls: tokens, seconds between asking and the last token, and its part
    of the engine: of its memory (bytes times seconds) and of its time. `cost` where the configuration has a price."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    byte_seconds: float = 0.0
    engine_seconds: float = 0.0
    cost: float | None = None

    def add(self, other: "Usage") -> None:
        """Count another's use to this one."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds
        self.byte_seconds += other.byte_seconds
        self.engine_seconds += other.engine_seconds
        if other.cost is not None:
            self.cost = (self.cost or 0.0) + other.cost


@dataclass(frozen=True)
class _Open:
    """A request in flight."""

    rank: int
    arrived_s: float


class UsageMeter:
    """One engine's requests, counted as they begin and end, and what they are charged. On the event loop's clock."""

    def __init__(self) -> None:
        self.arrived = 0
        self.finished = 0
        self.idle = Charge()
        self._open: dict[int, _Open] = {}
        self._each = Charge()
        self._held_bytes = 0
        self._since_s: float | None = None

    @property
    def in_flight(self) -> int:
        """Requests that have come and not ended, whether they run or wait."""
        return self.arrived - self.finished

    def hold(self, nbytes: int) -> None:
        """From now on the engine holds so many bytes, all included."""
        self._settle()
        self._held_bytes = nbytes

    @contextmanager
    def request(self, rank: int) -> Iterator[None]:
        """Count a request as in flight; `rank` is GenerateRequest.rank, by which engines admit."""
        self._settle()
        self.arrived += 1
        number, now_s = self.arrived, asyncio.get_running_loop().time()
        self._open[number] = _Open(rank, now_s)
        try:
            yield
        finally:
            self._settle()
            self.finished += 1
            del self._open[number]

    def waiting_since_s(self, running: int) -> float | None:
        """When the oldest request came that does not run, while so many do: engines admit by rank."""
        if running >= len(self._open):  # the usual case, at every look
            return None
        waiting = sorted(self._open.values(), key=lambda one: one.rank)[running:]
        return min(one.arrived_s for one in waiting)

    def charged(self) -> Charge:
        """What each request was charged that has been in flight since the beginning; take it twice, and subtract."""
        self._settle()
        return self._each

    def _settle(self) -> None:
        now_s = asyncio.get_running_loop().time()
        seconds = 0.0 if self._since_s is None else now_s - self._since_s
        self._since_s = now_s
        whole = Charge(self._held_bytes * seconds, seconds)
        if count := self.in_flight:
            each = self._each
            self._each = Charge(
                each.byte_seconds + whole.byte_seconds / count, each.engine_seconds + whole.engine_seconds / count
            )
        else:
            self.idle = Charge(
                self.idle.byte_seconds + whole.byte_seconds, self.idle.engine_seconds + whole.engine_seconds
            )
