"""Shows what the controller measures: the cost of each engine's steps, pauses of admission, and the device's use."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from runtime.control.costs import StepCost
from runtime.control.snapshot import DeviceMoment


def concurrency(max_active_seqs: int, paused_s: float) -> str:
    """Return how many requests an engine may run at once: "64", or "paused 1.2 s"."""
    return str(max_active_seqs) if max_active_seqs else f"paused {paused_s:.1f} s"


def table(engines: Mapping[str, tuple[StepCost, float | None]], devices: Mapping[str, DeviceMoment]) -> Group:
    """Return a table of the cost of each engine's steps and of its utilization of the GPU, with the devices below."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("engine")
    for title in ("step", "per sequence", "per prompt token", "measured", "GPU use"):
        shown.add_column(title, justify="right")
    for name, (cost, utilization) in engines.items():
        shown.add_row(
            name,
            f"{cost.step_s * 1e3:.1f} ms",
            f"{cost.sequence_s * 1e3:.2f} ms",
            f"{cost.prompt_token_s * 1e6:.1f} µs",
            f"{cost.confidence:.0%}",
            "" if utilization is None else f"{utilization:.0%}",
        )
    several = len(devices) > 1
    lines = [f"device {name}: {_line(device)}" if several else _line(device) for name, device in devices.items()]
    return Group(shown, Text("\n".join(lines), style="dim"))


def _line(device: DeviceMoment) -> str:
    used = f"utilization {device.utilization:.0%}" if device.utilization is not None else ""
    lanes = f"{device.lanes:.1f} engines at full speed at once ({device.lanes_confidence:.0%} measured)"
    return ", ".join(filter(None, (device.name, used, lanes, device.fault)))
