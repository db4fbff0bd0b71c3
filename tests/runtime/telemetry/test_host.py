"""Tests of the host as a source."""

import subprocess
import sys
import time

import psutil

from runtime.telemetry.host import HostSource


def test_host_lists_the_memory_of_child_processes() -> None:
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
