"""Compare two benchmarks: ratios of medians, and whether a difference exceeds the noise."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from runtime.bench import results
from runtime.bench.metrics_table import METRICS, number
from runtime.bench.results import Spread, Summary
from runtime.errors import InputError


@dataclass(frozen=True)
class Row:
    """One metric of one policy at one load.

    `ratio` is the median of b divided by that of a, or None if a is 0. `clear` is true if the ranges over the repeats
    do not overlap. `better` then names the better side.
    """

    policy: str
    load: float
    metric: str
    a: Spread
    b: Spread
    ratio: float | None
    clear: bool
    better: str | None


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, and warnings: an emulated device, and what makes the two benchmarks hard to compare."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


def compare(a: Path, b: Path) -> Comparison:
    """Compare the policies and loads that both folders have.

    Raises InputError if they have none in common, or if a folder holds no benchmark.
    """
    summary_a, summary_b = results.read_summary(a), results.read_summary(b)
    rows = [
        _row(point.policy, point.load, name, point.metrics[name], twin.metrics[name])
        for point in summary_a.points
        for twin in summary_b.points
        if (point.policy, point.load) == (twin.policy, twin.load)
        for name in point.metrics
        if name in twin.metrics
    ]
    if not rows:
        raise InputError(
            f"{a} has {_content(summary_a)}, and {b} has {_content(summary_b)}: they share no policy at the same load; "
            "run both with the same --policies and --loads"
        )
    return Comparison(tuple(rows), (*_emulations(summary_a, summary_b), *_differences(summary_a, summary_b)))


def table(comparison: Comparison, everything: bool = False) -> Table:
    """Return a table for the terminal, of the main metrics or of all."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("policy", "load", "metric", "a", "b", "b/a", ""):
        shown.add_column(title, justify="left" if title in ("policy", "metric", "") else "right", no_wrap=True)
    for row in comparison.rows:
        metric = METRICS.get(row.metric)
        if not everything and not (metric and metric.main):
            continue
        title = f"{metric.title} {metric.unit}".strip() if metric else row.metric
        verdict = "within noise" if not row.clear else f"{row.better} is better" if row.better else "differs"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        shown.add_row(
            row.policy,
            f"{row.load:g}",
            title,
            number(row.metric, row.a.median),
            number(row.metric, row.b.median),
            ratio,
            verdict,
        )
    return shown


def _row(policy: str, load: float, name: str, a: Spread, b: Spread) -> Row:
    clear = a.most < b.least or b.most < a.least
    metric = METRICS.get(name)
    better = None
    if clear and metric and metric.better:
        better = "a" if (a.median < b.median) == (metric.better == "lower") else "b"
    return Row(policy, load, name, a, b, b.median / a.median if a.median else None, clear, better)


def _emulations(a: Summary, b: Summary) -> list[str]:
    if a.emulation == b.emulation:
        return [a.emulation] if a.emulation else []
    device_a, device_b = (summary.emulation or "no emulated device" for summary in (a, b))
    return [f"the devices differ, so no figure compares. a has {device_a}. b has {device_b}."]


def _differences(a: Summary, b: Summary) -> list[str]:
    pairs = {
        "kind": (a.kind, b.kind),
        "workload": (a.workload, b.workload),
        "config": (a.config, b.config),
        "slo": (a.slo, b.slo),
        "machine": (dict(a.machine), dict(b.machine)),
        "repeats": (a.repeats, b.repeats),
        "stream_interval, and with it what ITL means,": (a.stream_interval, b.stream_interval),
    }
    return [f"{name} differs: {of_a} and {of_b}" for name, (of_a, of_b) in pairs.items() if of_a != of_b]


def _content(summary: Summary) -> str:
    return f"{', '.join(summary.policies)} at load {', '.join(f'{load:g}' for load in summary.loads)}"
