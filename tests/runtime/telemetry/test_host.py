"""Tests of the host as a source."""

import psutil

from runtime.telemetry.host import HostSource


def test_host_is_one_device_with_the_memory_of_the_machine() -> None:
    with HostSource() as source:
        [device] = source.read().devices
    assert device.total_bytes == psutil.virtual_memory().total
    assert 0 < device.used_bytes < device.total_bytes
    assert device.utilization is not None
    assert 0 <= device.utilization <= 1
