"""Reads the host as a device, through psutil. Without a GPU, all engines share its memory."""

import time
from typing import Self

import psutil

from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source


class HostSource(Source):
    """A source with one device, the host.

    Its readings list no processes: to find the engines, each one would have to look at every process of the machine.
    """

    kind: Kind = "host"

    def __enter__(self) -> Self:
        psutil.cpu_percent()  # starts the interval that the first reading covers
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def read(self) -> Reading:
        memory = psutil.virtual_memory()
        device = DeviceReading(
            name=f"host ({psutil.cpu_count()} cores)",
            total_bytes=memory.total,
            used_bytes=memory.total - memory.available,
            utilization=psutil.cpu_percent() / 100,
        )
        return Reading("host", (device,), time_s=time.monotonic())
