"""Reads the host as a device, through psutil. Without a GPU, all engines share its memory."""

import time
from typing import Self

import psutil

from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source


class HostSource(Source):
    """A source with one device, the host.

    `processes` holds this process's descendants and their resident bytes. Memory that processes share counts for each.
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
            processes=_descendants(),
        )
        return Reading("host", (device,), time_s=time.monotonic())


def _descendants() -> dict[int, int]:
    """Return the resident bytes of each descendant of this process, by process id."""
    resident_bytes = {}
    for process in psutil.Process().children(recursive=True):
        try:
            resident_bytes[process.pid] = int(process.memory_info().rss)
        except psutil.NoSuchProcess:  # it ended after it was listed
            continue
    return resident_bytes
