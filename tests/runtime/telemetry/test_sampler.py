"""Tests of the sampler over sources that change and hang, and of the choice of a source."""

import asyncio
import threading
from collections.abc import Callable
from typing import Self

import pytest

from runtime.telemetry import nvml
from runtime.telemetry import sampler as sampling
from runtime.telemetry.host import HostSource
from runtime.telemetry.nvml import NvmlSource
from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source
from runtime.telemetry.sampler import Sampler


class Counting(Source):
    """A source whose readings count up. It hangs while `may_answer` is clear, and records the threads that call it."""

    kind: Kind = "gpu"

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.count = 0
        self.threads: set[str] = set()
        self.closed = False

    def __enter__(self) -> Self:
        self.threads.add(threading.current_thread().name)
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def read(self) -> Reading:
        self.threads.add(threading.current_thread().name)
        self.may_answer.wait(30)
        self.count += 1
        return Reading("gpu", (DeviceReading("GPU", 1000, self.count),))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  another thread changes it
        await asyncio.sleep(0.01)


async def test_sampler_reads_periodically_in_its_thread_and_closes_the_source() -> None:
    source = Counting()
    async with asyncio.timeout(60), Sampler(source, every_s=0.01) as sampler:
        assert sampler.latest.devices[0].used_bytes >= 1
        await until(lambda: sampler.latest.devices[0].used_bytes >= 5)
        assert sampler.latest.devices[0].free_bytes <= 995
    assert source.threads == {"telemetry"}
    async with asyncio.timeout(60):
        await until(lambda: source.closed)


async def test_a_reading_that_fails_is_a_fault_until_the_next_one() -> None:
    source = Counting()
    read = source.read

    def fail() -> Reading:
        raise OSError(24, "Too many open files")

    async with asyncio.timeout(60), Sampler(source, every_s=0.01) as sampler:
        source.read = fail  # type: ignore[method-assign]
        await until(lambda: sampler.latest.fault == "cannot be read: [Errno 24] Too many open files")
        assert sampler.latest.devices
        source.read = read  # type: ignore[method-assign]
        await until(lambda: sampler.latest.fault is None)
        source.read = fail  # type: ignore[method-assign]
        await until(lambda: sampler.latest.fault is not None)


async def test_hanging_source_leaves_the_last_reading_with_a_fault() -> None:
    source = Counting()
    async with asyncio.timeout(60):
        async with Sampler(source, every_s=0.01, stale_s=0.1) as sampler:
            source.may_answer.clear()
            await until(lambda: sampler.latest.fault is not None)
            assert "no answer for" in str(sampler.latest.fault)
            assert sampler.latest.devices[0].total_bytes == 1000
            source.may_answer.set()
            await until(lambda: sampler.latest.fault is None)
            source.may_answer.clear()
            await asyncio.sleep(0.05)  # the source hangs in the thread while the sampler exits
    source.may_answer.set()


def test_source_follows_the_device_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = nvml.Device("NVIDIA L4", 24 << 30, 0, "580.65.06")
    monkeypatch.setattr(nvml, "devices", lambda: (gpu,))
    assert isinstance(sampling.best_source(on_gpu=True), NvmlSource)
    assert isinstance(sampling.best_source(on_gpu=False), HostSource)


def test_gpu_engines_use_nvml_even_if_the_driver_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> tuple[nvml.Device, ...]:
        raise nvml.DriverFault("Driver Not Loaded")

    monkeypatch.setattr(nvml, "devices", fails)
    assert isinstance(sampling.best_source(on_gpu=True), NvmlSource)


def test_gpu_without_own_memory_uses_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "devices", lambda: (nvml.Device("NVIDIA GB10", None, None, "580.65.06"),))
    assert isinstance(sampling.best_source(on_gpu=True), HostSource)
