"""Samples a source periodically, off the event loop, and keeps the latest reading."""

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
    """An async context manager that reads a source every `every_s` seconds, in a thread that also opens and closes it.

    A source that hangs blocks no one: `latest` then stays the last reading, and has a fault once that is older than
    `stale_s` seconds.
    """

    def __init__(self, source: Source, every_s: float = 0.1, stale_s: float = 5.0) -> None:
        self._source = source
        self._every_s = every_s
        self._stale_s = stale_s
        self._last = Reading(source.kind, (), "not read yet")

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
        """The latest reading, with a fault if it is older than `stale_s`."""
        age_s = self.age_s()
        if age_s < self._stale_s:
            return self._last
        return replace(self._last, fault=f"no answer for {age_s:.0f} s")

    def age_s(self) -> float:
        """Return the age of the latest reading in seconds."""
        return time.monotonic() - self._last.time_s

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._every_s)
            try:
                self._last = await loop.run_in_executor(self._thread, self._source.read)
            except Exception as error:  # noqa: BLE001  such as no free file descriptor; the next reading may succeed
                self._last = replace(self._last, fault=f"cannot be read: {error}")


def best_source(on_gpu: bool) -> Source:
    """Return NVML if the engines run on a GPU with memory of its own, otherwise the host, whose memory they use."""
    if not on_gpu:
        return HostSource()
    try:
        gpus = nvml.devices()
    except (nvml.NoDriver, nvml.DriverFault):
        return NvmlSource()  # its readings name the fault, and it retries
    return NvmlSource() if any(gpu.total_bytes for gpu in gpus) else HostSource()
