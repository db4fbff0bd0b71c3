"""The texts of what the controller measures."""

from rich.console import Console

from runtime.cli import measured
from runtime.control.costs import StepCost
from runtime.control.snapshot import DeviceMoment


def test_concurrency_says_how_long_admission_is_paused() -> None:
    assert measured.concurrency(64, 0.0) == "64"
    assert measured.concurrency(0, 1.234) == "paused 1.2 s"


def test_several_devices_are_told_apart() -> None:
    screen = Console(width=100)
    with screen.capture() as shown:
        screen.print(measured.table({}, {"0": DeviceMoment("gpu", "NVIDIA L4"), "2": DeviceMoment("gpu", "NVIDIA T4")}))
    lines = [line.strip() for line in shown.get().splitlines()]
    assert [line[:19] for line in lines[-2:]] == ["device 0: NVIDIA L4", "device 2: NVIDIA T4"]


def test_table_has_costs_utilization_and_the_device() -> None:
    costs = {"a": (StepCost(0.0121, 0.0002, 0.00003, 0.93), 0.41), "b": (StepCost(0.004, 0.00015, 0.00001), None)}
    device = DeviceMoment("gpu", "NVIDIA H200", utilization=0.73, fault="GPU is lost", lanes=1.72, lanes_confidence=0.8)
    screen = Console(width=100)
    with screen.capture() as shown:
        screen.print(measured.table(costs, {"0": device}))
    rows = [" ".join(line.split()) for line in shown.get().splitlines()]
    assert rows[1:] == [
        "a 12.1 ms 0.20 ms 30.0 µs 93% 41%",
        "b 4.0 ms 0.15 ms 10.0 µs 0%",
        "NVIDIA H200, utilization 73%, 1.7 engines at full speed at once (80% measured), GPU is lost",
    ]
