"""The metrics of a run: those of calls with the names, units and definitions of `vllm bench serve`, and those of jobs.

A job is good if it is answered, its answer is not known to be wrong, and it meets every limit of the SLO. Goodput is
the rate of good jobs.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.bench.results import CallRow, JobRow, Slo
from runtime.control.controller import Counts

GIB = 1 << 30


@dataclass(frozen=True)
class ResidencyFigures:
    """The effects of sleeping and waking in a run, over all engines.

    - `held`: requests that arrived while their engine slept.
    - `idle_byte_seconds`, `wakes`, `ahead`, `wasted`: see residency.keeper.Counts.
    """

    held: int
    idle_byte_seconds: float
    wakes: int
    ahead: int
    wasted: int

    def since(self, earlier: "ResidencyFigures") -> "ResidencyFigures":
        """Return what was added since earlier figures."""
        return ResidencyFigures(
            self.held - earlier.held,
            self.idle_byte_seconds - earlier.idle_byte_seconds,
            self.wakes - earlier.wakes,
            self.ahead - earlier.ahead,
            self.wasted - earlier.wasted,
        )

    def metrics(self, jobs: int) -> dict[str, float]:
        """Return these figures as metrics: per job, and as parts of all wakes."""
        measured = {
            "held_per_job": self.held / jobs,
            "idle_gib_seconds_per_job": self.idle_byte_seconds / GIB / jobs,
            "wakes_per_job": self.wakes / jobs,
        }
        if self.wakes:
            measured |= {"wakes_ahead": self.ahead / self.wakes, "wakes_wasted": self.wasted / self.wakes}
        return measured


def metrics(
    rows: Sequence[JobRow],
    seconds: float,
    slo: Slo,
    counts: Counts,
    preemptions: int,
    residency: ResidencyFigures | None = None,
) -> dict[str, float]:
    """Return the metrics of one run. Failed jobs count in `failed`, and in no metric of time."""
    done = [row for row in rows if row.error is None]
    calls = [call for row in done for call in row.calls]
    judged = [row.correct for row in rows if row.correct is not None]
    measured: dict[str, float] = {
        "jobs": len(rows),
        "failed": len(rows) - len(done),
        "duration_s": seconds,
        "request_throughput": len(calls) / seconds,
        "output_throughput": sum(call.completion_tokens for call in calls) / seconds,
        "job_throughput": len(done) / seconds,
        "goodput": sum(is_good(row, slo) for row in rows) / seconds,
        "preemptions": preemptions,
        "decisions": counts.decisions,
        "policy_faults": counts.faults,
        "resizes": counts.resizes,
        "moved_gib": counts.moved_bytes / GIB,
        "gib_seconds_per_job": statistics.fmean([row.gib_seconds for row in rows]) if rows else 0.0,
        "engine_seconds_per_job": statistics.fmean([row.engine_seconds for row in rows]) if rows else 0.0,
    }
    if residency and rows:
        measured |= residency.metrics(len(rows))
    if judged:
        measured["accuracy"] = statistics.fmean(judged)
    if costs := [row.cost for row in rows if row.cost is not None]:
        measured["cost_per_job"] = statistics.fmean(costs)
    if done:
        measured |= _statistics("jct_s", [row.jct_s for row in done])
    for name, values in _of_calls(calls).items():
        measured |= _statistics(f"{name}_ms", [value * 1000 for value in values])
    if counts.reactions_s:
        times_ms = sorted(reaction_s * 1000 for reaction_s in counts.reactions_s)
        measured |= {"reaction_p50_ms": _percentile(times_ms, 50), "reaction_p95_ms": _percentile(times_ms, 95)}
    return measured


def is_good(row: JobRow, slo: Slo) -> bool:
    """Return True if a job is answered, is not known to be wrong, and meets every limit."""
    limits = (
        (slo.jct_s, row.jct_s),
        (slo.ttft_s, max((call.ttft_s for call in row.calls), default=0.0)),
        (slo.tpot_s, max((call.tpot_s for call in row.calls), default=0.0)),
    )
    within = all(limit is None or value <= limit for limit, value in limits)
    return row.error is None and row.correct is not False and within


def _of_calls(calls: Iterable[CallRow]) -> Mapping[str, list[float]]:
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for call in calls:
        values["ttft"].append(call.ttft_s)
        values["e2el"].append(call.e2el_s)
        if call.completion_tokens > 1:
            values["tpot"].append(call.tpot_s)
            values["itl"] += call.itl_s
    return {name: measured for name, measured in values.items() if measured}


def _statistics(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"mean_{name}": statistics.fmean(ordered),
        f"median_{name}": _percentile(ordered, 50),
        **{f"p{p}_{name}": _percentile(ordered, p) for p in (90, 95, 99)},
    }


def _percentile(ordered: list[float], percent: float) -> float:
    """Interpolate between the two nearest values, as numpy.percentile does for `vllm bench serve`."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
