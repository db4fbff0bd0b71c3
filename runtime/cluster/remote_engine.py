"""A replica on another node, as the head sees it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from runtime.cluster import wire
from runtime.cluster.link import Link
from runtime.engines.grant import EngineLimits, Grant, Rejected, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineState, EngineStats
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import Held, UsageMeter
from runtime.errors import EngineDead, EngineError

_HELD = {EngineState.WAKING: Held.WAKING, EngineState.READY: Held.RESIDENT, EngineState.DRAINING: Held.RESIDENT}


class RemoteEngine(EngineHandle):
    """A replica that an agent runs. Its figures are those of the agent's latest report.

    Its agent resizes it, restarts it, puts it to sleep and wakes it. While the agent is lost, so is the replica:
    requests that it had raise EngineDead, and new ones wait.
    """

    def __init__(self, name: str, link: Link, report: wire.EngineReport) -> None:
        self.name = name
        self.usage = UsageMeter()
        self._link = link
        self._report = report
        self.update(report)

    def update(self, report: wire.EngineReport) -> None:
        """Take the figures of a report."""
        self._report = report
        if report.limits is not None:
            self.usage.hold(self.held_bytes, _HELD.get(report.stats.state, Held.ASLEEP))

    def enter(self, state: EngineState) -> None:
        """Note a state that the replica has entered since the latest report."""
        self._report = wire.EngineReport(
            replace(self._report.stats, state=state),
            self._report.limits,
            self._report.asleep_bytes,
            self._report.silent,
        )

    @property
    def silent(self) -> bool:
        """Whether the replica has not answered its last grant."""
        return self._report.silent

    async def start(self) -> None:
        """Do nothing: its agent has started it."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        now_s = asyncio.get_running_loop().time()
        async with aclosing(self._link.stream(lambda n: wire.generate(n, self.name, request, now_s))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def until_ready(self) -> None:
        while True:
            await self._link.until_found()
            if self.state is EngineState.ABSENT:
                raise EngineDead(f"engine {self.name} is absent")
            try:
                await self._link.call(lambda number: wire.UntilReady(number, self.name))
            except EngineDead:
                if self._link.lost is None:
                    raise
            else:
                return

    @property
    def limits(self) -> EngineLimits:
        if self._report.limits is None:
            raise EngineError(f"engine {self.name} has not started")
        return self._report.limits

    @property
    def held_bytes(self) -> int:
        return 0 if self._report.limits is None else super().held_bytes

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
        if self._link.lost is not None:
            return replace(stats, state=EngineState.LOST, running=0, waiting=0, pid=None)
        return stats

    async def pulse(self) -> None:
        if self._link.lost is not None:
            raise EngineDead(f"node {self._link.node} is lost: {self._link.lost}")

    def kill(self) -> None:
        """Do nothing: its agent kills it if it hangs."""

    async def close(self) -> None:
        """Do nothing: its agent closes it."""
