"""A replica on another node, as the head sees it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from runtime.cluster import wire
from runtime.cluster.link import Link
from runtime.engines.grant import EngineLimits, Grant, Rejected, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineState, EngineStats, Recalled
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import Held, UsageMeter
from runtime.errors import EngineDead, EngineError

GONE_S = 1.0
"""Seconds between two looks whether a device that is gone is back."""
_HELD = {EngineState.WAKING: Held.WAKING, EngineState.READY: Held.RESIDENT, EngineState.DRAINING: Held.RESIDENT}


class RemoteEngine(EngineHandle):
    """A replica that an agent runs. Its figures are those of the agent's latest report.

    Its agent resizes it, restarts it, puts it to sleep and wakes it. While the agent is lost, or has the replica no
    longer (`gone`), the replica is lost: requests that it had raise EngineDead, and new ones wait. `on_wait` is called
    when requests begin or cease to wait for it.
    """

    def __init__(
        self, name: str, link: Link, report: wire.EngineReport, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self.gone = False
        self.usage = UsageMeter()
        self._on_wait = on_wait
        self._sent = 0
        self._recalled = False
        self._link = link
        self._report = report
        self.update(report)

    def update(self, report: wire.EngineReport) -> None:
        """Take the figures of a report."""
        self._report = report
        self._recalled = False
        if report.limits is not None:
            self.usage.gpus = report.limits.gpus
            self.usage.hold(self.held_bytes, _HELD.get(report.stats.state, Held.ASLEEP))

    def lose(self) -> None:
        """Charge nothing while it is lost."""
        self.usage.hold(0, Held.ASLEEP)

    @property
    def is_lost(self) -> bool:
        """True if its agent does not answer, or no longer has the replica."""
        return self.gone or self._link.lost is not None

    @property
    def waiting(self) -> int:
        """The requests that wait at the head until the replica serves."""
        return max(self.usage.in_flight - self._sent, 0)

    def enter(self, state: EngineState) -> None:
        """Note a state that the replica has entered since the latest report."""
        self._report = wire.EngineReport(
            replace(self._report.stats, state=state),
            self._report.limits,
            self._report.asleep_bytes,
            self._report.silent,
            state is EngineState.READY,
        )

    @property
    def silent(self) -> bool:
        """Return True if the replica has not answered its last grant in time."""
        return self._report.silent

    async def start(self) -> None:
        """Do nothing: its agent has started it."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        now_s = asyncio.get_running_loop().time()
        self._sent += 1
        self._on_wait()
        try:
            async with aclosing(self._link.stream(lambda n: wire.generate(n, self.name, request, now_s))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Recalled:
            self._recalled = True  # until its agent reports again
            raise
        finally:
            self._sent -= 1

    @property
    def is_ready(self) -> bool:
        return self.state is EngineState.READY and self._report.ready and not self._recalled

    async def until_ready(self) -> None:
        self._on_wait()
        while True:
            await self._link.until_found()
            if self.gone:
                await asyncio.sleep(GONE_S)
                continue
            if self.state is EngineState.ABSENT:
                raise EngineDead(f"engine {self.name} is absent")
            try:
                await self._link.call(lambda number: wire.UntilReady(number, self.name))
            except EngineDead:
                if self._link.lost is None:
                    raise
            else:
                self.enter(EngineState.READY)
                self._recalled = False
                return

    @property
    def limits(self) -> EngineLimits:
        if self._report.limits is None:
            raise EngineError(f"engine {self.name} has not started")
        return self._report.limits

    @property
    def held_bytes(self) -> int:
        return 0 if self._report.limits is None or self.is_lost else super().held_bytes

    @property
    def asleep_bytes(self) -> int:
        return self._report.asleep_bytes

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        del grace_s
        return Rejected(grant, f"node {self._link.node} resizes engine {self.name}")

    async def sleep(self, deep: bool = False) -> None:
        raise EngineError(f"node {self._link.node} puts engine {self.name} to sleep")

    async def wake(self) -> None:
        raise EngineError(f"node {self._link.node} wakes engine {self.name}")

    def stats(self) -> EngineStats:
        stats = self._report.stats
        if self.is_lost:
            return replace(stats, state=EngineState.LOST, running=0, waiting=0, pid=None)
        return stats

    async def pulse(self) -> None:
        if self.is_lost:
            raise EngineDead(f"engine {self.name} is lost: {self._link.lost or 'its device is gone'}")

    def excuse_death(self) -> None:
        self._link.post(wire.Excuse(self.name))

    def kill(self) -> None:
        """Do nothing: its agent kills it if it hangs."""

    async def close(self) -> None:
        """Do nothing: its agent closes it."""
