"""NVIDIA's management library, read through pynvml; the only importer of it.

Sizes are in bytes. Every fault of the library comes out as one of the two exceptions below.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self, TypeVar

import pynvml

from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source

__all__ = ["Device", "DriverFault", "NoDriver", "NvmlSource", "devices"]
T = TypeVar("T")
RETRY_S = 5.0
"""A driver that is gone is asked again no sooner."""


class NoDriver(Exception):
    """This machine has no NVIDIA driver: its library is not there."""


GONE = (
    pynvml.NVMLError_GpuIsLost,
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_Unknown,
)
"""Errors after which nothing more is to be had of a device."""


class DriverFault(Exception):
    """The driver is there and does not answer; the message is the driver's own."""


@dataclass(frozen=True)
class Device:
    """One GPU as the driver reports it. Memory is None where it has none of its own (a GPU sharing the host's)."""

    name: str
    total_bytes: int | None
    used_bytes: int | None
    driver_version: str


def devices() -> tuple[Device, ...]:
    """All GPUs, in the driver's order. Raises NoDriver, DriverFault."""
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
    """All devices that a process can run on, in NVML's order: each GPU or, if the GPU is divided by MIG, its instances.

    NVML orders GPUs by PCI bus and ignores CUDA_VISIBLE_DEVICES, so an index here is not CUDA's: compare UUIDs. The
    library is held open; when the driver as a whole does not answer it is closed, and opened anew `retry_s` later. What
    one device does not support is None; a device that is lost keeps its last figures.
    """

    kind: Kind = "gpu"

    def __init__(self, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._open = False
        self._tried_s = float("-inf")
        self._known: dict[int, tuple[DeviceReading, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._shut()

    def read(self) -> Reading:
        now_s = time.monotonic()
        try:
            self._init(now_s)
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._shut()
            return Reading("gpu", tuple(chain.from_iterable(self._known.values())), str(error), now_s)
        devices = tuple(chain.from_iterable(self._devices(index) for index in range(count)))
        if devices and all(device.fault for device in devices):
            self._shut()  # a GPU that was lost comes back only to a library that is opened anew
        return Reading("gpu", devices, time_s=now_s)

    def _init(self, now_s: float) -> None:
        if self._open:
            return
        if now_s - self._tried_s < self._retry_s:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        self._tried_s = now_s
        pynvml.nvmlInit()
        self._open = True

    def _shut(self) -> None:
        if self._open:
            self._open = False
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _devices(self, index: int) -> tuple[DeviceReading, ...]:
        """Read one GPU, or its MIG instances; their last figures if the GPU does not answer."""
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            found = tuple(_reading(handle) for handle in _instances(gpu) or [gpu])
        except pynvml.NVMLError as error:
            last = self._known.get(index, (DeviceReading(f"GPU {index}", 0, 0),))
            return tuple(replace(device, fault=str(error)) for device in last)
        self._known[index] = found
        return found


def _instances(gpu: Any) -> list[Any]:
    """Return the handles of a GPU's MIG instances; none if it is not divided. Raises NVMLError."""
    mode = _supported(pynvml.nvmlDeviceGetMigMode, gpu)
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    handles = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        with suppress(pynvml.NVMLError_NotFound):  # the places of instances need not be taken in order
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return handles


def _reading(handle: Any) -> DeviceReading:
    """One device's figures. Raises NVMLError for a fault of the device."""
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
    running = _optional(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if running is None:
        return None
    return {process.pid: int(process.usedGpuMemory) for process in running if process.usedGpuMemory is not None}


def _supported(ask: Callable[..., T], *arguments: Any) -> T | None:
    """Return what the driver says, None if the device or an older driver does not support it. Raises NVMLError."""
    try:
        return ask(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None


def _optional(ask: Callable[..., T], *arguments: Any) -> T | None:
    """Return what the driver says, None if it does not say it, for whatever reason: it is a MIG instance, or secret.

    Raises NVMLError if the device, or the driver, is gone.
    """
    try:
        return _supported(ask, *arguments)
    except GONE:
        raise
    except pynvml.NVMLError:
        return None
