"""nvml through the real pynvml, over a scripted library (stubs/nvml_stub.c) in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import stubs

ASK = """
import dataclasses, json
from runtime.telemetry import nvml
try:
    print(json.dumps([dataclasses.asdict(device) for device in nvml.devices()]))
except (nvml.NoDriver, nvml.DriverFault) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def ask(environment: Mapping[str, str]) -> Any:
    command = [sys.executable, "-c", ASK]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


H200 = {"driver": "580.65.06", "count": 1, "0.name": "NVIDIA H200", "0.total": 150754820096, "0.used": 4 << 30}


def test_devices(tmp_path: Path) -> None:
    second = {"count": 2, "1.name": "NVIDIA L4", "1.total": 100, "1.used": 30}
    assert ask(stubs.nvml(tmp_path, {**H200, **second})) == [
        {"name": "NVIDIA H200", "total_bytes": 150754820096, "used_bytes": 4 << 30, "driver_version": "580.65.06"},
        {"name": "NVIDIA L4", "total_bytes": 100, "used_bytes": 30, "driver_version": "580.65.06"},
    ]


def test_a_device_without_memory_of_its_own(tmp_path: Path) -> None:
    shared = {key: value for key, value in H200.items() if key not in ("0.total", "0.used")}
    [device] = ask(stubs.nvml(tmp_path, shared))
    assert (device["total_bytes"], device["used_bytes"]) == (None, None)


def test_a_driver_and_no_device(tmp_path: Path) -> None:
    assert ask(stubs.nvml(tmp_path, {"driver": "580.65.06"})) == []


@pytest.mark.parametrize(
    ("lines", "says"),
    [({"init.error": 9}, "Driver Not Loaded"), ({**H200, "0.error": 15}, "GPU is lost")],
)
def test_faults_are_the_drivers_own_words(tmp_path: Path, lines: Mapping[str, object], says: str) -> None:
    assert ask(stubs.nvml(tmp_path, lines)) == f"DriverFault: {says}"


def test_no_driver(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("")  # found first, and no library: as if there were none
    assert ask({"LD_LIBRARY_PATH": str(tmp_path)}) == "NoDriver: no NVIDIA driver"


WATCH = """
import dataclasses, json, sys
from runtime.telemetry.nvml import NvmlSource
with NvmlSource(retry_s=0) as source:
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(source.read())), flush=True)
"""

BUSY = {
    **H200,
    "0.gpu": 73,
    "0.power": 412_000,
    "0.temperature": 61,
    "0.processes": "101:2000,7",
}


class Watching:
    """A process with an open NvmlSource over a script that may change between two readings."""

    def __init__(self, folder: Path, lines: Mapping[str, object]) -> None:
        self.folder = folder
        environment = {**os.environ, **stubs.nvml(folder, lines)}
        command = [sys.executable, "-c", WATCH]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, lines: Mapping[str, object] | None = None) -> Any:
        """The next reading, after the driver's answers were changed to `lines`."""
        if lines is not None:
            stubs.nvml(self.folder, lines)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watching]:
    watching = Watching(tmp_path, BUSY)
    yield watching
    watching.process.communicate(timeout=10)
    assert watching.process.returncode == 0


def test_a_reading_has_all_figures_in_their_units(watching: Watching) -> None:
    reading = watching.read()
    assert (reading["kind"], reading["fault"]) == ("gpu", None)
    assert reading["devices"] == [
        {
            "name": "NVIDIA H200",
            "total_bytes": 150754820096,
            "used_bytes": 4 << 30,
            "utilization": 0.73,
            "processes": {"101": 2000},
            "power_w": 412.0,
            "temperature_c": 61.0,
            "fault": None,
        }
    ]


def test_values_change_and_a_foreign_process_shows(watching: Watching) -> None:
    watching.read()
    [device] = watching.read({**BUSY, "0.used": 90 << 30, "0.gpu": 5, "0.processes": f"101:2000,4242:{80 << 30}"})[
        "devices"
    ]
    assert device["used_bytes"] == 90 << 30
    assert device["processes"] == {"101": 2000, "4242": 80 << 30}
    assert device["utilization"] == 0.05


def test_what_a_device_does_not_support_is_none(watching: Watching) -> None:
    [device] = watching.read(H200)["devices"]
    assert [device[key] for key in ("utilization", "processes", "power_w", "temperature_c", "fault")] == [None] * 5


def test_a_lost_gpu_is_said_keeps_its_figures_and_comes_back(watching: Watching) -> None:
    watching.read()
    [device] = watching.read({**BUSY, "0.error": 15, "0.used": 0})["devices"]
    assert device["fault"] == "GPU is lost"
    assert device["used_bytes"] == 4 << 30
    [device] = watching.read(BUSY)["devices"]
    assert device["fault"] is None


def test_one_lost_gpu_of_two_is_no_fault_of_the_other(watching: Watching) -> None:
    two = {**BUSY, "count": 2, "1.name": "NVIDIA L4", "1.total": 100, "1.used": 30, "0.error": 15}
    first, second = watching.read(two)["devices"]
    assert first["fault"] == "GPU is lost"
    assert (second["fault"], second["used_bytes"]) == (None, 30)


def test_a_driver_that_is_unloaded_and_comes_back(watching: Watching) -> None:
    watching.read()
    watching.read({**BUSY, "0.error": 15})
    reading = watching.read({**BUSY, "init.error": 9})
    assert reading["fault"] == "Driver Not Loaded"
    assert reading["devices"][0]["used_bytes"] == 4 << 30
    assert watching.read(BUSY)["fault"] is None
