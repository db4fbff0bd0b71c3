"""The sampler over sources that change, fail and hang; and the host as a source."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

import psutil
import pytest

from runtime.telemetry import nvml
from runtime.telemetry import sampler as sampling
from runtime.telemetry.host import HostSource
from runtime.telemetry.nvml import NvmlSource
from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source
from runtime.telemetry.sampler import Sampler


class Counting(Source):
    """Every reading uses a byte more; it hangs while told to. Notes the threads that it is called in."""

    kind: Kind = "gpu"

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
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
        self.go_on.wait(30)
        self.count += 1
        return Reading("gpu", (DeviceReading("GPU", 1000, self.count),))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  what is waited for is another thread's doing
        await asyncio.sleep(0.01)


async def test_it_reads_again_and_again_off_the_event_loop_and_closes() -> None:
    source = Counting()
    async with asyncio.timeout(60), Sampler(source, every_s=0.01) as sampler:
        assert sampler.latest.devices[0].used_bytes >= 1
        await until(lambda: sampler.latest.devices[0].used_bytes >= 5)
        assert sampler.latest.devices[0].free_bytes <= 995
    assert source.threads == {"telemetry"}
    async with asyncio.timeout(60):
        await until(lambda: source.closed)


async def test_a_driver_that_hangs_stops_nobody_and_is_said() -> None:
    source = Counting()
    async with asyncio.timeout(60):
        async with Sampler(source, every_s=0.01, stale_s=0.1) as sampler:
            source.go_on.clear()
            await until(lambda: sampler.latest.fault is not None)
            assert "no answer for" in str(sampler.latest.fault)
            assert sampler.latest.devices[0].total_bytes == 1000
            source.go_on.set()
            await until(lambda: sampler.latest.fault is None)
            source.go_on.clear()
            await asyncio.sleep(0.05)  # it hangs in the thread as the sampler is left
    source.go_on.set()


def test_the_host_is_a_device_whose_processes_are_our_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "x = b'1' * (50 << 20); input()"], stdin=subprocess.PIPE)
    try:
        with HostSource() as source:
            end = time.monotonic() + 60
            while (reading := source.read()).devices[0].processes.get(child.pid, 0) < 50 << 20:  # type: ignore[union-attr]
                assert time.monotonic() < end
                time.sleep(0.05)
            [device] = reading.devices
            assert device.total_bytes == psutil.virtual_memory().total
            assert 0 < device.used_bytes < device.total_bytes
            assert device.utilization is not None
            assert 0 <= device.utilization <= 1
    finally:
        child.communicate(b"\n")
    with HostSource() as source:
        assert child.pid not in (source.read().devices[0].processes or {})


def test_engines_on_the_host_are_read_from_the_host_whatever_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = nvml.Device("NVIDIA L4", 24 << 30, 0, "580.65.06")
    monkeypatch.setattr(nvml, "devices", lambda: (gpu,))
    assert isinstance(sampling.best_source(on_gpu=True), NvmlSource)
    assert isinstance(sampling.best_source(on_gpu=False), HostSource)


def test_engines_on_a_gpu_whose_driver_does_not_answer_are_not_judged_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> tuple[nvml.Device, ...]:
        raise nvml.DriverFault("Driver Not Loaded")

    monkeypatch.setattr(nvml, "devices", fails)
    assert isinstance(sampling.best_source(on_gpu=True), NvmlSource)


def test_a_gpu_without_memory_of_its_own_is_read_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "devices", lambda: (nvml.Device("NVIDIA GB10", None, None, "580.65.06"),))
    assert isinstance(sampling.best_source(on_gpu=True), HostSource)
