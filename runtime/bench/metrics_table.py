"""The table of metrics: title, unit, which direction is better, and how many decimals to print."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One metric. `main` metrics are printed by default."""

    title: str
    unit: str
    better: Better | None
    decimals: int
    main: bool = False


def _times(title: str, unit: str, suffix: str, decimals: int, main: tuple[str, ...]) -> dict[str, Metric]:
    kinds = ("mean", "median", "p90", "p95", "p99")
    return {f"{kind}_{suffix}": Metric(f"{title} {kind}", unit, "lower", decimals, kind in main) for kind in kinds}


METRICS: Mapping[str, Metric] = {
    **_times("JCT", "s", "jct_s", 2, ("mean", "median", "p95", "p99")),
    "job_throughput": Metric("jobs", "/s", "higher", 2, main=True),
    "goodput": Metric("goodput", "jobs/s", "higher", 2, main=True),
    "request_throughput": Metric("requests", "/s", "higher", 1),
    "output_throughput": Metric("output tokens", "/s", "higher", 0, main=True),
    "accuracy": Metric("accuracy", "", "higher", 3, main=True),
    **_times("TTFT", "ms", "ttft_ms", 0, ("median", "p99")),
    **_times("TPOT", "ms", "tpot_ms", 1, ("median", "p99")),
    **_times("ITL", "ms", "itl_ms", 1, ()),
    **_times("E2EL", "ms", "e2el_ms", 0, ()),
    "gib_seconds_per_job": Metric("memory a job", "GiB s", "lower", 3, main=True),
    "engine_seconds_per_job": Metric("engine time a job", "s", "lower", 3),
    "held_per_job": Metric("held requests a job", "", "lower", 3, main=True),
    "idle_gib_seconds_per_job": Metric("idle memory a job", "GiB s", "lower", 3, main=True),
    "wakes_per_job": Metric("wakes a job", "", "lower", 3),
    "wakes_ahead": Metric("wakes before a request needed them", "", "higher", 3),
    "wakes_wasted": Metric("wakes without a request", "", "lower", 3),
    "cost_per_job": Metric("cost a job", "", "lower", 6, main=True),
    "preemptions": Metric("preemptions", "", "lower", 0, main=True),
    "resizes": Metric("resizes", "", None, 0, main=True),
    "moved_gib": Metric("moved", "GiB", None, 2),
    "decisions": Metric("decisions", "", None, 0),
    "policy_faults": Metric("policy faults", "", "lower", 0),
    "reaction_p50_ms": Metric("burst to memory p50", "ms", "lower", 1),
    "reaction_p95_ms": Metric("burst to memory p95", "ms", "lower", 1),
    "failed": Metric("failed", "jobs", "lower", 0, main=True),
    "jobs": Metric("jobs", "", None, 0),
    "duration_s": Metric("duration", "s", None, 1),
}


def number(name: str, value: float) -> str:
    """Return a value as text, with the decimals of its metric."""
    return f"{value:,.{METRICS[name].decimals}f}" if name in METRICS else f"{value:g}"
