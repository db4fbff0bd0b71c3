"""A benchmark's main figures for the terminal."""

from rich.table import Table

from runtime.bench.results import Point, Summary

COLUMNS = (
    ("JCT p50 s", "median_jct_s", 2),
    ("p95 s", "p95_jct_s", 2),
    ("jobs/s", "job_throughput", 2),
    ("goodput/s", "goodput", 2),
    ("tokens/s", "output_throughput", 0),
    ("TTFT p99 ms", "p99_ttft_ms", 0),
    ("accuracy", "accuracy", 3),
    ("preempted", "preemptions", 0),
    ("resizes", "resizes", 0),
)


def table(summary: Summary) -> Table:
    """Medians over the repeats, with ranges where there were several."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("policy", no_wrap=True)
    if len(summary.loads) > 1:
        shown.add_column("load", justify="right")
    for title, _, _ in COLUMNS:
        shown.add_column(title, justify="right", no_wrap=True)
    for point in summary.points:
        load = [f"{point.load:g}"] if len(summary.loads) > 1 else []
        shown.add_row(point.policy, *load, *(_cell(point, metric, digits) for _, metric, digits in COLUMNS))
    return shown


def _cell(point: Point, metric: str, digits: int) -> str:
    spread = point.metrics.get(metric)
    if spread is None:
        return ""
    if spread.least == spread.most:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f}-{spread.most:.{digits}f})"
