"""Charges an engine's memory and time to the requests that it has in flight.

At every moment the requests in flight share the engine's memory and time in equal parts. With no request in flight the
engine is idle. The meter therefore keeps one integral of (bytes / requests in flight) over time. The charge of a
request is the integral's value at its end minus the value at its start.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Held(StrEnum):
    """The reason for which an engine holds memory: it is ready to serve, it wakes, or it sleeps and keeps a part."""

    RESIDENT = "resident"
    WAKING = "waking"
    ASLEEP = "asleep"


@dataclass
class Spent:
    """Seconds, and memory held times seconds."""

    seconds: float = 0.0
    byte_seconds: float = 0.0


@dataclass(frozen=True)
class Charge:
    """Memory held times seconds, and seconds of the whole engine.

    `waking_byte_seconds` is the part of `byte_seconds` for which the engine was waking and could not serve.
    """

    byte_seconds: float = 0.0
    engine_seconds: float = 0.0
    waking_byte_seconds: float = 0.0

    def __add__(self, other: "Charge") -> "Charge":
        return Charge(
            self.byte_seconds + other.byte_seconds,
            self.engine_seconds + other.engine_seconds,
            self.waking_byte_seconds + other.waking_byte_seconds,
        )

    def __sub__(self, other: "Charge") -> "Charge":
        return Charge(
            self.byte_seconds - other.byte_seconds,
            self.engine_seconds - other.engine_seconds,
            self.waking_byte_seconds - other.waking_byte_seconds,
        )


@dataclass
class Account:
    """The charge of one request by all engines that work on it.

    `device_seconds` is its part of the memory of a GPU, times seconds, summed over the GPUs of each engine.
    """

    charge: Charge = Charge()
    device_seconds: float = 0.0

    def add(self, charge: Charge, device_bytes: int) -> None:
        """Add the charge of an engine on a device with this much memory."""
        self.charge += charge
        self.device_seconds += charge.byte_seconds / device_bytes


@dataclass
class Usage:
    """The use of engines by one seat in a job, summed over its calls.

    - `prompt_tokens`, `completion_tokens`: token counts.
    - `seconds`: from asking to the last token.
    - `byte_seconds`, `engine_seconds`: its charge for the engine's memory and time.
    - `cost`: in the currency of the configured price. None without a price.
    - `waking_byte_seconds`: the part of `byte_seconds` for which the engine was waking.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    byte_seconds: float = 0.0
    engine_seconds: float = 0.0
    cost: float | None = None
    waking_byte_seconds: float = 0.0

    def add(self, other: "Usage") -> None:
        """Add another usage to this one."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.seconds += other.seconds
        self.byte_seconds += other.byte_seconds
        self.engine_seconds += other.engine_seconds
        self.waking_byte_seconds += other.waking_byte_seconds
        if other.cost is not None:
            self.cost = (self.cost or 0.0) + other.cost


@dataclass(frozen=True)
class _InFlight:
    """A request in flight. `order` is its place in the order of admission."""

    order: tuple[int, int]
    arrived_s: float
    began_s: float


@dataclass(frozen=True)
class Waiting:
    """The requests of an engine that wait: when the first of them arrived, and when the oldest of their jobs began."""

    arrived_s: float
    began_s: float


class UsageMeter:
    """The requests of one engine and their charges. All times are on the event loop's clock, in seconds.

    - `arrived`, `finished`: counts of requests.
    - `answered`: how many of the finished ones have got a whole reply. Others were aborted, or sent to another replica.
    - `idle`: the charge for the time without requests in flight.
    - `gpus`: on how many GPUs the engine holds the same bytes. Charges are for all of them.
    """

    def __init__(self) -> None:
        self.gpus = 1
        self.arrived = 0
        self.finished = 0
        self.answered = 0
        self.idle = Charge()
        self._spent = {held: Spent() for held in Held}
        self._in_flight: dict[int, _InFlight] = {}  # by number, so in the order of arrival
        self._by_rank: list[tuple[int, int]] = []  # rank and number of each, sorted
        self._by_job: list[tuple[float, int]] = []  # beginning of its job and number of each, sorted
        self._charged = Charge()
        self._held_bytes = 0
        self._held = Held.RESIDENT
        self._settled_s: float | None = None

    @property
    def in_flight(self) -> int:
        """The number of requests that run or wait."""
        return self.arrived - self.finished

    def hold(self, nbytes: int, held: Held = Held.RESIDENT) -> None:
        """Set the bytes that the engine holds of each GPU from now on, weights and buffers included, and what for."""
        self._settle()
        self._held_bytes, self._held = nbytes * self.gpus, held

    @contextmanager
    def request(self, rank: int, began_s: float | None = None) -> Iterator[None]:
        """Count a request as in flight.

        `rank` is its GenerateRequest.rank, by which engines admit requests, and `began_s` when its job began, if it has
        one.
        """
        self._settle()
        self.arrived += 1
        number, now_s = self.arrived, asyncio.get_running_loop().time()
        order, by_job = (rank, number), (now_s if began_s is None else began_s, number)
        self._in_flight[number] = _InFlight(order, now_s, by_job[0])
        insort(self._by_rank, order)
        insort(self._by_job, by_job)
        try:
            yield
        finally:
            self._settle()
            self.finished += 1
            del self._in_flight[number]
            del self._by_rank[bisect_left(self._by_rank, order)]
            del self._by_job[bisect_left(self._by_job, by_job)]

    def waiting(self, running: int) -> Waiting | None:
        """Return the requests that wait, given how many requests run, or None if none waits.

        The meter does not see which requests run. It assumes those of the lowest ranks, because engines admit by rank.
        It looks at `running` requests at most, however many wait.
        """
        if running >= len(self._in_flight):
            return None
        first = self._by_rank[running]
        arrived_s = next(request.arrived_s for request in self._in_flight.values() if request.order >= first)
        began_s = next(began_s for began_s, number in self._by_job if self._in_flight[number].order >= first)
        return Waiting(arrived_s, began_s)

    def spent(self) -> Mapping[Held, Spent]:
        """Return the engine's time and memory since the beginning, by what the memory was held for."""
        self._settle()
        return self._spent

    def charged(self) -> Charge:
        """Return the charge of a request that has been in flight since the beginning.

        Subtract the value at a request's start from the value at its end to get the request's charge.
        """
        self._settle()
        return self._charged

    def _settle(self) -> None:
        """Charge the time since the last settlement to the requests in flight, or to idleness."""
        now_s = asyncio.get_running_loop().time()
        seconds = 0.0 if self._settled_s is None else now_s - self._settled_s
        self._settled_s = now_s
        byte_seconds = self._held_bytes * seconds
        self._spent[self._held].seconds += seconds
        self._spent[self._held].byte_seconds += byte_seconds
        whole = Charge(byte_seconds, seconds, byte_seconds if self._held is Held.WAKING else 0.0)
        if count := self.in_flight:
            self._charged += Charge(
                whole.byte_seconds / count, whole.engine_seconds / count, whole.waking_byte_seconds / count
            )
        else:
            self.idle += whole
