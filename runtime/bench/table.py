"""A benchmark's main metrics, as a table for the terminal."""

from rich.table import Table

from runtime.bench.metrics_table import number
from runtime.bench.results import Spread, Summary

COLUMNS = {
    "median_jct_s": "JCT p50 s",
    "p95_jct_s": "p95 s",
    "job_throughput": "jobs/s",
    "goodput": "goodput/s",
    "output_throughput": "tokens/s",
    "accuracy": "right",
}


def table(summary: Summary) -> Table:
    """Return a table of medians over the repeats, with the ranges below them if they differ. It fits 80 columns.

    Its caption says so if the device is emulated.
    """
    shown = Table(box=None, pad_edge=False, header_style="dim", caption=summary.emulation, caption_justify="left")
    shown.add_column("policy")
    if len(summary.loads) > 1:
        shown.add_column("load", justify="right")
    for title in COLUMNS.values():
        shown.add_column(title, justify="right", no_wrap=True)
    for point in summary.points:
        load = [f"{point.load:g}"] if len(summary.loads) > 1 else []
        shown.add_row(point.policy, *load, *(_cell(name, point.metrics.get(name)) for name in COLUMNS))
    return shown


def _cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    median = number(name, spread.median)
    if spread.least == spread.most:
        return median
    return f"{median}\n[dim]{number(name, spread.least)}-{number(name, spread.most)}[/]"
