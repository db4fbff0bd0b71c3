"""The host as a device: where there is no GPU, engines share its memory. Read through psutil."""

import time
from typing import Self

import psutil

from runtime.telemetry.reading import DeviceReading, Kind, Reading, Source


class HostSource(Source):
    """One device, the machine. `processes` are this process's descendants and their resident bytes, in which pages that
    they share are counted for each."""

    kind: Kind = "host"

    def __enter__(self) -> Self:
        psutil.cpu_percent()  # the first call begins the interval that the next one is about
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
    held = {}
    for process in psutil.Process().children(recursive=True):
        try:
            held[process.pid] = int(process.memory_info().rss)
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return held
