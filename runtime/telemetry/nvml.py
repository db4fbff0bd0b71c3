"""NVIDIA's management library, read through pynvml; the only importer of it.

Sizes are in bytes. Every fault of the library comes out as one of the two exceptions below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pynvml

__all__ = ["Device", "DriverFault", "NoDriver", "devices"]


class NoDriver(Exception):
    """This machine has no NVIDIA driver: its library is not there."""


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
