"""What the machine said at one moment, and the contract of whoever asks it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

Kind = Literal["gpu", "host"]


@dataclass(frozen=True)
class DeviceReading:
    """One device that a process can run on. Memory in bytes, `utilization` 0 to 1; None is what it does not say.

    `uuid` is that of the GPU or, under MIG, of the instance, in lower case without NVML's prefix ("GPU-", "MIG-"): as
    CUDA reports it. It is empty for the host.

    `processes` maps process numbers to the bytes that each holds on the device. `fault` says why there are no figures
    now ("GPU is lost"): those given are then the last known ones, or 0.
    """

    name: str
    total_bytes: int
    used_bytes: int
    utilization: float | None = None
    processes: Mapping[int, int] | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    fault: str | None = None
    uuid: str = ""

    @property
    def free_bytes(self) -> int:
        """What nobody holds."""
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True)
class Reading:
    """All devices of a kind at `time_s` (time.monotonic). `fault` says that there is nobody to ask any more."""

    kind: Kind
    devices: tuple[DeviceReading, ...]
    fault: str | None = None
    time_s: float = field(default_factory=time.monotonic)


class Source(ABC):
    """Whoever can be asked. A context manager: entering opens the library behind it, leaving closes it."""

    kind: Kind

    @abstractmethod
    def read(self) -> Reading:
        """Ask now; may block. Raises nothing for a fault of a device or its driver: the reading says so."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...
