"""Readings of devices, and the interface of the sources that take them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

Kind = Literal["gpu", "host"]


@dataclass(frozen=True)
class DeviceReading:
    """One device that a process can run on. Memory in bytes, `utilization` from 0 to 1; None if it has no value.

    `processes` maps process ids to the bytes that each process holds on the device. `process_utilization` maps them to
    the part of the time in which each process used the device, from 0 to 1. Both have the ids of the device's driver:
    in a container, they may be others than those that a process sees itself.

    `fault` is the reason why the device cannot be read now, for example "GPU is lost". The other values are then the
    last ones read, or 0.

    `uuid` identifies the GPU or, under MIG, the instance, as CUDA reports it: in lower case, without NVML's prefix
    ("GPU-", "MIG-"). It is empty for the host.
    """

    name: str
    total_bytes: int
    used_bytes: int
    utilization: float | None = None
    processes: Mapping[int, int] | None = None
    process_utilization: Mapping[int, float] | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    fault: str | None = None
    uuid: str = ""

    @property
    def free_bytes(self) -> int:
        """The bytes that no process holds."""
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True)
class Reading:
    """All devices of one kind at `time_s` (time.monotonic). `fault` is the reason why the source cannot be read now."""

    kind: Kind
    devices: tuple[DeviceReading, ...]
    fault: str | None = None
    time_s: float = field(default_factory=time.monotonic)


class Source(ABC):
    """An interface to devices. As a context manager, it opens the library behind it on entry and closes it on exit."""

    kind: Kind

    @abstractmethod
    def read(self) -> Reading:
        """Read all devices now. May block. A faulty device or driver raises nothing: the reading names the fault."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...
