"""Tests of telemetry.nvml with the real pynvml over a scripted library (stubs/nvml_stub.c), in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """Return the devices that a new process lists, or the type and message of its exception."""
    command = [sys.executable, "-c", ASK]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


H200 = {"driver": "580.65.06", "count": 1, "0.name": "NVIDIA H200", "0.total": 150754820096, "0.used": 4 << 30}


def test_devices_are_listed_in_the_order_of_the_driver(tmp_path: Path) -> None:
    second = {"count": 2, "1.name": "NVIDIA L4", "1.total": 100, "1.used": 30}
    assert ask(stubs.nvml(tmp_path, {**H200, **second})) == [
        {"name": "NVIDIA H200", "total_bytes": 150754820096, "used_bytes": 4 << 30, "driver_version": "580.65.06"},
        {"name": "NVIDIA L4", "total_bytes": 100, "used_bytes": 30, "driver_version": "580.65.06"},
    ]


def test_device_without_own_memory_has_none(tmp_path: Path) -> None:
    shared = {key: value for key, value in H200.items() if key not in ("0.total", "0.used")}
    [device] = ask(stubs.nvml(tmp_path, shared))
    assert (device["total_bytes"], device["used_bytes"]) == (None, None)


def test_driver_without_devices(tmp_path: Path) -> None:
    assert ask(stubs.nvml(tmp_path, {"driver": "580.65.06"})) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [({"init.error": 9}, "Driver Not Loaded"), ({**H200, "0.error": 15}, "GPU is lost")],
)
def test_fault_has_the_message_of_the_driver(tmp_path: Path, lines: Mapping[str, object], message: str) -> None:
    assert ask(stubs.nvml(tmp_path, lines)) == f"DriverFault: {message}"


def test_missing_library_means_no_driver(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("")  # found first, and cannot be loaded
    assert ask({"LD_LIBRARY_PATH": str(tmp_path)}) == "NoDriver: no NVIDIA driver"


WATCH = """
import dataclasses, json, sys, time
from runtime.telemetry.nvml import NvmlSource
with NvmlSource(retry_s=0) as source:
    for line in sys.stdin:
        now_s = float(line)
        time.monotonic = lambda: now_s
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
    """A process with an open NvmlSource, over a script and a clock that can change between two readings."""

    def __init__(self, folder: Path, lines: Mapping[str, object]) -> None:
        self.folder = folder
        environment = {**os.environ, **stubs.nvml(folder, lines)}
        command = [sys.executable, "-c", WATCH]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, lines: Mapping[str, object] | None = None, at_s: float = 0) -> Any:
        """Return a reading at this time. If `lines` is given, the driver answers with it from now on."""
        if lines is not None:
            stubs.nvml(self.folder, lines)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{at_s}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def watch(folder: Path, lines: Mapping[str, object]) -> Iterator[Watching]:
    watching = Watching(folder, lines)
    yield watching
    watching.process.communicate(timeout=60)
    assert watching.process.returncode == 0


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watching]:
    with watch(tmp_path, BUSY) as watching:
        yield watching


def test_reading_has_all_values_in_their_units(watching: Watching) -> None:
    reading = watching.read()
    assert (reading["kind"], reading["fault"]) == ("gpu", None)
    assert reading["devices"] == [
        {
            "name": "NVIDIA H200",
            "total_bytes": 150754820096,
            "used_bytes": 4 << 30,
            "utilization": 0.73,
            "processes": {"101": 2000},
            "process_utilization": None,
            "power_w": 412.0,
            "temperature_c": 61.0,
            "fault": None,
            "uuid": "",
        }
    ]


def test_reading_follows_changes_and_shows_foreign_processes(watching: Watching) -> None:
    watching.read()
    [device] = watching.read({**BUSY, "0.used": 90 << 30, "0.gpu": 5, "0.processes": f"101:2000,4242:{80 << 30}"})[
        "devices"
    ]
    assert device["used_bytes"] == 90 << 30
    assert device["processes"] == {"101": 2000, "4242": 80 << 30}
    assert device["utilization"] == 0.05


def test_unsupported_values_are_none(watching: Watching) -> None:
    [device] = watching.read(H200)["devices"]
    assert [device[key] for key in ("utilization", "processes", "power_w", "temperature_c", "fault")] == [None] * 5


def test_utilization_of_a_process_is_the_mean_of_its_new_samples(watching: Watching) -> None:
    sampled = {**BUSY, "0.processes": "101:2000,102:2000", "0.samples": "5:101:40,6:101:80,6:9:10"}
    assert utilization(watching.read(sampled)) == {"101": 0.6, "102": 0, "9": 0.1}
    absurd = {**sampled, "0.samples": f"{sampled['0.samples']},7:101:25,99:101:4000000000"}
    assert utilization(watching.read(absurd)) == {"101": 0.25, "102": 0, "9": 0.1}
    later = {**sampled, "0.samples": "7:101:25,8:101:50"}  # the absurd sample has not set the time of the last one
    assert utilization(watching.read(later)) == {"101": 0.5, "102": 0, "9": 0.1}


def test_utilization_of_a_process_stays_for_a_second_without_samples(watching: Watching) -> None:
    first = {**BUSY, "0.samples": "5:101:40"}
    assert utilization(watching.read(first, at_s=10)) == {"101": 0.4}
    second = {**BUSY, "0.samples": "5:101:40,6:102:20"}
    assert utilization(watching.read(second, at_s=10.9)) == {"101": 0.4, "102": 0.2}
    assert utilization(watching.read(at_s=11.1)) == {"101": 0, "102": 0.2}
    assert utilization(watching.read(at_s=12)) == {"101": 0}


def utilization(reading: Any) -> Any:
    """Return the utilization of each process on the only device."""
    [device] = reading["devices"]
    return device["process_utilization"]


def test_lost_gpu_has_a_fault_and_its_last_values_until_it_returns(watching: Watching) -> None:
    watching.read()
    [device] = watching.read({**BUSY, "0.error": 15, "0.used": 0})["devices"]
    assert device["fault"] == "GPU is lost"
    assert device["used_bytes"] == 4 << 30
    [device] = watching.read(BUSY)["devices"]
    assert device["fault"] is None


def test_lost_gpu_leaves_the_other_without_a_fault(watching: Watching) -> None:
    two = {**BUSY, "count": 2, "1.name": "NVIDIA L4", "1.total": 100, "1.used": 30, "0.error": 15}
    first, second = watching.read(two)["devices"]
    assert first["fault"] == "GPU is lost"
    assert (second["fault"], second["used_bytes"]) == (None, 30)


GPUS = {
    "driver": "580.65.06",
    "count": 3,
    "0.name": "NVIDIA A100",
    "0.uuid": "GPU-0000AAAA-0000-0000-0000-000000000000",
    "0.total": 40 << 30,
    "0.used": 1 << 30,
    "0.mig": 4,
    "0.mig.0.name": "NVIDIA A100 MIG 3g.20gb",
    "0.mig.0.uuid": "MIG-00000000-0000-0000-0000-0000000000a0",
    "0.mig.0.total": 20 << 30,
    "0.mig.0.used": 19 << 30,
    "0.mig.2.name": "NVIDIA A100 MIG 2g.10gb",
    "0.mig.2.uuid": "MIG-00000000-0000-0000-0000-0000000000a2",
    "0.mig.2.total": 10 << 30,
    "0.mig.2.used": 1 << 30,
    "1.name": "NVIDIA H200",
    "1.uuid": "GPU-11111111-1111-1111-1111-111111111111",
    "1.total": 100 << 30,
    "1.used": 99 << 30,
    "1.gpu": 100,
    "2.name": "NVIDIA H200",
    "2.uuid": "GPU-22222222-2222-2222-2222-222222222222",
    "2.total": 100 << 30,
    "2.used": 10 << 30,
    "2.gpu": 7,
    "2.processes": "1000:100,1001:100",
    "2.samples": "5:1000:30",
}
"""A GPU divided by MIG, one that another process fills, and one that is nearly free."""
A0, A2 = (f"00000000-0000-0000-0000-0000000000{place}" for place in ("a0", "a2"))
BUSY_GPU, FREE_GPU = ("-".join(digit * n for n in (8, 4, 4, 4, 12)) for digit in "12")


def test_gpu_in_mig_mode_is_read_as_its_instances(tmp_path: Path) -> None:
    with watch(tmp_path, GPUS) as watching:
        devices = watching.read()["devices"]
        assert [d["process_utilization"] for d in devices] == [None, None, None, {"1000": 0.3, "1001": 0}]
        assert [(d["uuid"], d["used_bytes"] >> 30) for d in devices] == [
            (A0, 19),
            (A2, 1),
            (BUSY_GPU, 99),
            (FREE_GPU, 10),
        ]
        devices = watching.read({**GPUS, "0.error": 15})["devices"]
        assert [(d["uuid"], d["fault"]) for d in devices[:2]] == [(A0, "GPU is lost"), (A2, "GPU is lost")]
        assert [d["fault"] for d in devices[2:]] == [None, None]


OBSERVE = """
import asyncio, json, sys
from dataclasses import asdict, replace
from runtime.control.forecast import Forecast
from runtime.control.snapshotter import Snapshotter
from runtime.engines.fake import FakeEngine, FakeMemory
from runtime.engines.grant import Grant
from runtime.telemetry.nvml import NvmlSource

async def main():
    engines = {}
    for number, uuid in enumerate(sys.argv[1:]):
        engine = FakeEngine(str(number), str, memory=FakeMemory(device=10 << 30), grant=Grant(0.5, 64, 2048))
        await engine.start()
        engine._limits = replace(engine.limits, device_uuids=tuple(uuid.split()))
        engine.stats = lambda stats=engine.stats, pid=1000 + number: replace(stats(), pid=pid)
        engines[str(number)] = engine
    with NvmlSource() as source:
        snapshot = Snapshotter(engines, Forecast(), reading=source.read).take(1.0, 20 << 30, 10 << 30)
    used = [view.utilization for view in snapshot.views]
    print(json.dumps({"budget": snapshot.budget_bytes >> 30, "used": used, **asdict(snapshot.device)}))

asyncio.run(main())
"""


def observe(folder: Path, *uuids: str) -> Any:
    """Return the controller's view of the device for engines on these UUIDs, with a budget of 20 GiB, 10 of it held."""
    environment = {**os.environ, **stubs.nvml(folder, GPUS)}
    command = [sys.executable, "-c", OBSERVE, *uuids]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("uuid", "name", "used_gib", "budget_gib"),
    [
        (FREE_GPU, "NVIDIA H200", 10, 20),
        (BUSY_GPU, "NVIDIA H200", 99, 9),
        (A0, "NVIDIA A100 MIG 3g.20gb", 19, 10),
        (A2, "NVIDIA A100 MIG 2g.10gb", 1, 18),
    ],
)
def test_budget_follows_the_device_that_the_engines_run_on(
    uuid: str, name: str, used_gib: int, budget_gib: int, tmp_path: Path
) -> None:
    seen = observe(tmp_path, uuid, uuid)
    assert (seen["uuid"], seen["name"], seen["used_bytes"] >> 30) == (uuid, name, used_gib)
    assert (seen["fault"], seen["budget"]) == (None, budget_gib)


def test_the_budget_of_a_group_follows_the_gpu_that_has_least_free(tmp_path: Path) -> None:
    group = f"{FREE_GPU} {BUSY_GPU}"
    seen = observe(tmp_path, group, group)
    assert (seen["name"], seen["used_bytes"] >> 30, seen["budget"]) == ("2 x NVIDIA H200", 99, 9)
    assert (seen["uuid"], seen["fault"]) == (f"{BUSY_GPU} {FREE_GPU}", None)


@pytest.mark.parametrize(
    "uuids",
    [
        ("33333333-3333-3333-3333-333333333333",),  # NVML does not list this UUID
        ("0000aaaa-0000-0000-0000-000000000000",),  # in MIG mode, no process can run on the whole GPU
        (BUSY_GPU, FREE_GPU),  # engines on two devices have no common budget
        ("",),  # the engine does not report its UUID
    ],
)
def test_unknown_device_is_a_fault(uuids: tuple[str, ...], tmp_path: Path) -> None:
    seen = observe(tmp_path, *uuids)
    theirs = ", ".join(uuids) or "a device that they do not name"
    assert f"the engines run on {theirs}; telemetry lists {A0}, {A2}, {BUSY_GPU}" in seen["fault"]
    assert (seen["used_bytes"], seen["foreign_bytes"], seen["budget"]) == (0, 0, 20)


DECIDE = """
import json, sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from runtime.simulation import virtual_time
from runtime.telemetry.nvml import NvmlSource
from tests import stubs
from tests.runtime.control.test_controller import mean_admitted

folder, lines, samples = Path(sys.argv[1]), json.loads(sys.argv[2]), count(5)

def read(rig):
    at = next(samples)  # the driver has sampled again since the last read
    stubs.nvml(folder, {**lines, "2.samples": ",".join(f"{at}:{pid}:{used}" for pid, used in lines["used"].items())})
    for number, engine in enumerate(rig.engines.values()):
        engine._limits = replace(engine.limits, device_uuids=("{uuid}",))
        if engine.stats().pid is None:
            engine.stats = lambda stats=engine.stats, pid=1000 + number: replace(stats(), pid=pid)
    return source.read()

with NvmlSource() as source:
    print(virtual_time.run(mean_admitted(read)))
"""


def decide(folder: Path, utilization: int, used: int) -> float:
    """Return how many of two engines `turns` admits on average.

    NVML reports the utilization of their GPU and how much of it each of them uses, in percent.
    """
    lines = {**GPUS, "2.gpu": utilization, "used": {1000: used, 1001: used}}
    environment = {**os.environ, **stubs.nvml(folder, GPUS)}
    command = [sys.executable, "-c", DECIDE.replace("{uuid}", FREE_GPU), str(folder), json.dumps(lines)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_decisions_follow_the_utilization_that_nvml_reports(tmp_path: Path) -> None:
    half_idle = decide(tmp_path, utilization=45, used=45)
    saturated = decide(tmp_path, utilization=100, used=50)
    others = decide(tmp_path, utilization=100, used=23)  # a foreign process has the rest
    assert half_idle > saturated + 0.3
    assert others == pytest.approx(saturated, abs=0.1)


def test_engines_use_of_the_device_is_that_of_their_processes(tmp_path: Path) -> None:
    seen = observe(tmp_path, FREE_GPU, FREE_GPU, FREE_GPU)  # NVML does not list the process of the third
    assert seen["used"] == [0.3, 0, None]
    assert observe(tmp_path, A0)["used"] == [None]


def test_unloaded_driver_is_a_fault_until_it_returns(watching: Watching) -> None:
    watching.read()
    watching.read({**BUSY, "0.error": 15})
    reading = watching.read({**BUSY, "init.error": 9})
    assert reading["fault"] == "Driver Not Loaded"
    assert reading["devices"][0]["used_bytes"] == 4 << 30
    assert watching.read(BUSY)["fault"] is None
