"""A benchmark's plots, as PNG files. The only module that imports matplotlib.

A policy has the same colour in all plots; the limit is grey.
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from runtime.bench import results
from runtime.bench.results import JobRow, Moment, Summary

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
GREY = "#888888"
BINS = 240
"""Maximum number of moments in a plot. A plot of this width cannot show more."""
MIB = 1 << 20
Panel = Callable[[Axes, Sequence[float], Mapping[str, list[Moment]]], None]
Values = Callable[[JobRow], list[float]]


@dataclass(frozen=True)
class Plot:
    """A plot on disk, and an explanation of how to read it."""

    title: str
    explanation: str
    path: Path


def draw(folder: Path) -> list[Plot]:
    """Draw all plots of the benchmark in a folder into its subfolder `plots`. Each says so if the device is emulated.

    Raises InputError if the folder holds no benchmark.
    """
    summary = results.read_summary(folder)
    jobs = list(results.read_jobs(folder))
    moments = list(results.read_moments(folder))
    (folder / "plots").mkdir(exist_ok=True)
    at_load = f" at a load of {_plotted_load(summary):g}" if len(summary.loads) > 1 else ""
    drawn = (
        (
            "Job completion time over load" if len(summary.loads) > 1 else "Job completion time",
            "Lower is better. Points are medians over the repeats, bars are ranges. The limit has all the memory.",
            "latency",
            latency(summary),
        ),
        (
            f"Job completion times, all jobs{at_load}",
            "Fraction of jobs (y) that were answered within a time (x). Further left is better.",
            "jct-cdf",
            distribution(summary, _by_policy(summary, jobs, lambda job: [job.jct_s]), "job completion time, s"),
        ),
        (
            f"Time to first token, all calls{at_load}",
            "Fraction of calls (y) whose first token came within a time (x). Further left is better.",
            "ttft-cdf",
            distribution(summary, _by_policy(summary, jobs, lambda job: [c.ttft_s for c in job.calls]), "TTFT, s"),
        ),
        (
            f"KV cache by engine{at_load}",
            "Each engine's KV cache in the first repeat, stacked. A policy that follows the work moves memory with it.",
            "shares",
            shares(summary, moments),
        ),
        (
            f"Waiting requests by engine{at_load}",
            "Requests that wait at each engine, over the same time.",
            "queues",
            queues(summary, moments),
        ),
    )
    plots = []
    for title, explanation, name, figure in drawn:
        path = folder / "plots" / f"{name}.png"
        if summary.emulation:
            figure.supxlabel(textwrap.fill(summary.emulation, width=130), fontsize=7, color=GREY)
        FigureCanvasAgg(figure)
        figure.savefig(path)
        plots.append(Plot(title, explanation, path))
    return plots


def latency(summary: Summary) -> Figure:
    """Plot p95 job completion time over the loads, or p50, p95 and p99 if there is a single load."""
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if len(summary.loads) > 1:
        _over_loads(axes, summary)
    else:
        _side_by_side(axes, summary)
    axes.set_ylabel("job completion time, s")
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    _legend(axes)
    return figure


def _over_loads(axes: Axes, summary: Summary) -> None:
    for policy in summary.policies:
        spreads = [summary.point(policy, load).metrics["p95_jct_s"] for load in summary.loads]
        medians = [spread.median for spread in spreads]
        low = [spread.median - spread.least for spread in spreads]
        high = [spread.most - spread.median for spread in spreads]
        style = "--" if policy == summary.limit else "-"
        axes.errorbar(
            summary.loads,
            medians,
            (low, high),
            label=policy,
            color=_colour(summary, policy),
            marker="o",
            markersize=4,
            linestyle=style,
            capsize=3,
        )
    axes.set_xlabel("load, in multiples of the workload's rate")
    axes.set_title("p95", loc="left", fontsize=10)


def _side_by_side(axes: Axes, summary: Summary) -> None:
    names = ("median_jct_s", "p95_jct_s", "p99_jct_s")
    width = 0.8 / len(summary.policies)
    for index, policy in enumerate(summary.policies):
        spreads = [summary.point(policy, summary.loads[0]).metrics[name] for name in names]
        places = [place + (index - (len(summary.policies) - 1) / 2) * width for place in range(len(names))]
        medians = [spread.median for spread in spreads]
        low = [spread.median - spread.least for spread in spreads]
        high = [spread.most - spread.median for spread in spreads]
        axes.errorbar(
            places,
            medians,
            (low, high),
            label=policy,
            color=_colour(summary, policy),
            marker="o",
            linestyle="none",
            capsize=3,
        )
    axes.set_xticks(range(len(names)), ["p50", "p95", "p99"])


def distribution(summary: Summary, values: Mapping[str, list[float]], label: str) -> Figure:
    """Plot the cumulative distribution of values under each policy."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for policy in summary.policies:
        ordered = sorted(values.get(policy, ()))
        if not ordered:
            continue
        heights = [(index + 1) / len(ordered) for index in range(len(ordered))]
        style = "--" if policy == summary.limit else "-"
        axes.plot(ordered, heights, label=policy, color=_colour(summary, policy), linestyle=style)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("fraction")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def shares(summary: Summary, moments: Iterable[Moment]) -> Figure:
    """Plot every engine's KV cache over time, stacked, in one panel for each policy."""

    def panel(axes: Axes, times: Sequence[float], engines: Mapping[str, list[Moment]]) -> None:
        names = list(engines)
        values = [
            [m.engines[name].kv_cache_bytes / MIB if name in m.engines else 0 for m in engines[name]] for name in names
        ]
        axes.stackplot(times, values, labels=names, colors=COLOURS, alpha=0.85)

    return _panels(summary, moments, panel, "KV cache, MiB")


def queues(summary: Summary, moments: Iterable[Moment]) -> Figure:
    """Plot the requests that wait for each engine over time, in one panel for each policy."""

    def panel(axes: Axes, times: Sequence[float], engines: Mapping[str, list[Moment]]) -> None:
        for index, name in enumerate(engines):
            waiting = [m.engines[name].waiting if name in m.engines else math.nan for m in engines[name]]
            axes.plot(times, waiting, label=name, color=COLOURS[index % len(COLOURS)], linewidth=1)

    return _panels(summary, moments, panel, "waiting")


def _panels(summary: Summary, moments: Iterable[Moment], panel: Panel, label: str) -> Figure:
    policies = [policy for policy in summary.policies if policy != summary.limit] or list(summary.policies)
    load = _plotted_load(summary)
    series: dict[str, list[Moment]] = defaultdict(list)
    for moment in moments:
        if moment.repeat == 0 and moment.load == load:
            series[moment.policy].append(moment)
    columns = 2 if len(policies) > 1 else 1
    rows = -(-len(policies) // columns)
    figure = Figure(figsize=(8, 1.9 * rows + 0.6), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, policy in zip(grid.flat, policies, strict=False):
        thinned = _thinned(series[policy])
        axes.set_title(policy, loc="left", fontsize=9)
        if thinned:
            # An engine that restarts is missing from some moments.
            engines = [name for moment in thinned for name in moment.engines]
            panel(axes, [moment.at_s for moment in thinned], dict.fromkeys(engines, thinned))
    for axes in list(grid.flat)[len(policies) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("s")
    for row in grid:
        row[0].set_ylabel(label)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def _plotted_load(summary: Summary) -> float:
    """Return the load of the plots that show one: the middle one."""
    return summary.loads[len(summary.loads) // 2]


def _thinned(moments: Sequence[Moment]) -> list[Moment]:
    """Return at most `BINS` moments, the last one of each bin of time."""
    if len(moments) <= BINS:
        return list(moments)
    end_s = moments[-1].at_s or 1.0
    kept = {int(moment.at_s / end_s * BINS): moment for moment in moments}
    return list(kept.values())


def _by_policy(summary: Summary, jobs: Iterable[JobRow], values: Values) -> dict[str, list[float]]:
    by_policy: dict[str, list[float]] = defaultdict(list)
    load = _plotted_load(summary)
    for job in jobs:
        if job.error is None and job.load == load:
            by_policy[job.policy] += values(job)
    return by_policy


def _colour(summary: Summary, policy: str) -> str:
    if policy == summary.limit:
        return GREY
    return COLOURS[[p for p in summary.policies if p != summary.limit].index(policy) % len(COLOURS)]


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=2)
