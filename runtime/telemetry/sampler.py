"""Reads a source again and again, off the event loop; whoever wants to know takes the latest."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import Self

from runtime.daemon_thread import DaemonExecutor
from runtime.telemetry import nvml
from runtime.telemetry.host import HostSource
from runtime.telemetry.nvml import NvmlSource
from runtime.telemetry.reading import Reading, Source


class Sampler:
    """An async context manager over a source, which is opened, read and closed in one thread of its own.

    A source that hangs stops nobody: `latest` is then the last reading, with a fault once it is older than `stale_s`.
    """

    def __init__(self, source: Source, every_s: float = 0.1, stale_s: float = 5.0) -> None:
        self._source = source
        self._every_s = every_s
        self._stale_s = stale_s
        self._last = Reading(source.kind, (), "nothing was read yet")

    async def __aenter__(self) -> Self:
        self._thread = DaemonExecutor("telemetry")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._source.__enter__)
        self._last = await loop.run_in_executor(self._thread, self._source.read)
        self._task = asyncio.create_task(self._run(), name="telemetry")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.submit(self._source.__exit__, None, None, None)
        self._thread.shutdown()

    @property
    def latest(self) -> Reading:
        """The newest reading, with a fault where it is too old."""
        age_s = self.age_s()
        if age_s < self._stale_s:
            return self._last
        return replace(self._last, fault=f"no answer for {age_s:.0f} s")

    def age_s(self) -> float:
        """How long ago the newest reading was taken: seconds."""
        return time.monotonic() - self._last.time_s

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._every_s)
            self._last = await loop.run_in_executor(self._thread, self._source.read)


def best_source(on_gpu: bool) -> Source:
    """Return NVML if the engines run on a GPU with memory of its own, else the host, whose memory they share."""
    if not on_gpu:
        return HostSource()
    try:
        gpus = nvml.devices()
    except (nvml.NoDriver, nvml.DriverFault):
        return NvmlSource()  # which says so, and asks again
    return NvmlSource() if any(gpu.total_bytes for gpu in gpus) else HostSource()
