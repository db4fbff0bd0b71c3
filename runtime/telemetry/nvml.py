"""Reads GPUs through NVML, NVIDIA's management library. No other module imports pynvml.

Memory is in bytes. `devices` raises NoDriver or DriverFault for any error of the library; `NvmlSource` raises neither
and names the error in its reading.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any, Self, TypeVar

import pynvml

from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source

__all__ = ["Device", "DriverFault", "NoDriver", "NvmlSource", "devices"]
T = TypeVar("T")
RETRY_S = 5.0
"""Seconds between two attempts to open a driver that does not answer."""
SAMPLED_S = 1.0
"""NVML samples the utilization of a busy process at least this often. A process without a sample for longer is idle."""
_GONE = (
    pynvml.NVMLError_GpuIsLost,
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_Unknown,
)
"""Errors that mean that the device or its driver is gone, not that it lacks one value."""


class NoDriver(Exception):
    """This machine has no NVIDIA driver: NVML's shared library is missing."""


class DriverFault(Exception):
    """The driver is installed and returned an error. The message is the driver's own."""


@dataclass(frozen=True)
class Device:
    """One GPU as the driver reports it. Memory is None if the GPU shares the host's."""

    name: str
    total_bytes: int | None
    used_bytes: int | None
    driver_version: str


def devices() -> tuple[Device, ...]:
    """Return all GPUs in the driver's order. Raises NoDriver or DriverFault."""
    with _library():
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return tuple(_device(index, driver) for index in range(pynvml.nvmlDeviceGetCount()))


def _device(index: int, driver_version: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = _text(pynvml.nvmlDeviceGetName(handle))
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:
        return Device(name, None, None, driver_version)
    return Device(name, int(memory.total), int(memory.used), driver_version)


@contextmanager
def _library() -> Iterator[None]:
    """Keep NVML open. Raises NoDriver or DriverFault for any error of NVML inside the block."""
    try:
        pynvml.nvmlInit()
        try:
            yield
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError_LibraryNotFound:
        raise NoDriver("no NVIDIA driver") from None
    except pynvml.NVMLError as error:
        raise DriverFault(str(error)) from None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class NvmlSource(Source):
    """All devices that a process can run on, in NVML's order: each GPU or, if MIG divides the GPU, its instances.

    NVML orders GPUs by PCI bus and ignores CUDA_VISIBLE_DEVICES, so an index here is not CUDA's: compare UUIDs.

    The source keeps NVML open. If the driver as a whole does not answer, it closes NVML and opens it again after
    `retry_s` seconds. A value that a device does not support is None. A lost device keeps its last values.

    MIG instances do not report the utilization of their processes.
    """

    kind: Kind = "gpu"

    def __init__(self, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._open = False
        self._last_attempt_s = float("-inf")
        self._last_readings: dict[int, tuple[DeviceReading, ...]] = {}
        self._samples: dict[int, _Samples] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def read(self) -> Reading:
        now_s = time.monotonic()
        try:
            self._ensure_open(now_s)
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._close()
            return Reading("gpu", tuple(chain.from_iterable(self._last_readings.values())), str(error), now_s)
        devices = tuple(chain.from_iterable(self._read_gpu(index, now_s) for index in range(count)))
        if devices and all(device.fault for device in devices):
            self._close()  # NVML finds a lost GPU again only after it is reopened
        return Reading("gpu", devices, time_s=now_s)

    def _ensure_open(self, now_s: float) -> None:
        """Open NVML if it is closed. Raises NVMLError if that fails, or if `retry_s` have not passed since it did."""
        if self._open:
            return
        if now_s - self._last_attempt_s < self._retry_s:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        self._last_attempt_s = now_s
        pynvml.nvmlInit()
        self._open = True

    def _close(self) -> None:
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _read_gpu(self, index: int, now_s: float) -> tuple[DeviceReading, ...]:
        """Read one GPU or its MIG instances. If the GPU does not answer, return its last readings with the fault."""
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            readings = tuple(_read(instance) for instance in _mig_instances(gpu))
            if not readings:
                whole = _read(gpu)
                samples = self._samples.setdefault(index, _Samples())
                readings = (replace(whole, process_utilization=samples.read(gpu, whole.processes or (), now_s)),)
        except pynvml.NVMLError as error:
            last = self._last_readings.get(index, (DeviceReading(f"GPU {index}", 0, 0),))
            return tuple(replace(device, fault=str(error)) for device in last)
        self._last_readings[index] = readings
        return readings


class _Samples:
    """NVML's samples of what part of the time each process used a GPU, averaged since the last read.

    NVML may sample less often than it is read, so an average stays for SAMPLED_S unless newer samples replace it.
    """

    def __init__(self) -> None:
        self._seen_us = 0
        self._averages: dict[int, float] = {}
        self._sampled_s: dict[int, float] = {}

    def read(self, gpu: Any, processes: Iterable[int], now_s: float) -> Mapping[int, float] | None:
        """Return the utilization of each process, from 0 to 1; None if the GPU does not report it.

        NVML takes no samples of an idle process, so `processes` without a sample have 0. Raises NVMLError if the GPU or
        the driver is gone.
        """
        samples = _samples_since(gpu, self._seen_us)
        if samples is None:
            return None
        percents: dict[int, list[int]] = {}
        for sample in samples:
            percents.setdefault(sample.pid, []).append(sample.smUtil)
            self._seen_us = max(self._seen_us, sample.timeStamp)
            self._sampled_s[sample.pid] = now_s
        self._averages |= {pid: fmean(values) / 100 for pid, values in percents.items()}
        for pid, sampled_s in [*self._sampled_s.items()]:
            if now_s - sampled_s > SAMPLED_S:
                del self._averages[pid], self._sampled_s[pid]
        return {**dict.fromkeys(processes, 0.0), **self._averages}


def _samples_since(gpu: Any, seen_us: int) -> list[Any] | None:
    """Return NVML's newer samples of the utilization of processes; None if the GPU does not report it.

    Raises NVMLError if the GPU or the driver is gone.
    """
    try:
        samples = pynvml.nvmlDeviceGetProcessUtilization(gpu, seen_us)
    except _GONE:
        raise
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InsufficientSize):
        return []  # no sample yet, or another one came between pynvml's two calls: the next read gets them
    except pynvml.NVMLError as error:
        return [] if error.value == pynvml.NVML_SUCCESS else None  # pynvml raises success without samples as an error
    # The array may have places that the driver did not fill: their values are old, or absurd.
    return [sample for sample in samples if sample.timeStamp > seen_us and sample.smUtil <= 100]


def _mig_instances(gpu: Any) -> list[Any]:
    """Return the handles of a GPU's MIG instances; none if the GPU is not in MIG mode. Raises NVMLError."""
    mode = _supported(pynvml.nvmlDeviceGetMigMode, gpu)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    handles = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        with suppress(pynvml.NVMLError_NotFound):  # instances may leave places empty
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return handles


def _read(handle: Any) -> DeviceReading:
    """Read one GPU or MIG instance. Raises NVMLError if it has a fault."""
    uuid = _supported(pynvml.nvmlDeviceGetUUID, handle)
    name = _text(pynvml.nvmlDeviceGetName(handle))
    memory = _supported(pynvml.nvmlDeviceGetMemoryInfo, handle)
    rates = _optional(pynvml.nvmlDeviceGetUtilizationRates, handle)
    milliwatts = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
    celsius = _optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    return DeviceReading(
        name=name,
        total_bytes=int(memory.total) if memory else 0,
        used_bytes=int(memory.used) if memory else 0,
        utilization=None if rates is None else rates.gpu / 100,
        processes=_processes(handle),
        power_w=None if milliwatts is None else milliwatts / 1000,
        temperature_c=None if celsius is None else float(celsius),
        uuid="" if uuid is None else _text(uuid).partition("-")[2].lower(),
    )


def _processes(handle: Any) -> Mapping[int, int] | None:
    """Return the device bytes of each process, by process id; None if the device does not list its processes."""
    running = _optional(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if running is None:
        return None
    return {process.pid: int(process.usedGpuMemory) for process in running if process.usedGpuMemory is not None}


def _supported(query: Callable[..., T], *arguments: Any) -> T | None:
    """Return the driver's answer, or None if the device or an older driver does not support the query.

    Raises NVMLError for any other error.
    """
    try:
        return query(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None


def _optional(query: Callable[..., T], *arguments: Any) -> T | None:
    """Return the driver's answer, or None if it gives none, for example for a MIG instance or without permission.

    Raises NVMLError if the device or the driver is gone.
    """
    try:
        return _supported(query, *arguments)
    except _GONE:
        raise
    except pynvml.NVMLError:
        return None
