"""nvml through the real pynvml, over a scripted library (stubs/nvml_stub.c) in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
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
