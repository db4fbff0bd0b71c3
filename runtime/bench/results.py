"""The files of a benchmark's folder: `summary.json`, `jobs.jsonl` and `decisions.jsonl`, as types to write and read.

Metrics have the names and units of `vllm bench serve`: times of calls (ttft, tpot, itl, e2el) are in milliseconds, and
throughputs are per second. Times of jobs (jct) are in seconds.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from agents.role import Value, explain
from runtime.control.policy import Worded
from runtime.control.snapshot import EngineMoment
from runtime.errors import InputError

SUMMARY, JOBS, DECISIONS = "summary.json", "jobs.jsonl", "decisions.jsonl"


@dataclass(frozen=True)
class Spread:
    """The median and the range of a metric over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


class Slo(Value):
    """The limits that a good job meets. By default there is no limit."""

    jct_s: float | None = Field(
        default=None, gt=0, description="Job completion time (JCT): from the arrival to the answer, in seconds."
    )
    ttft_s: float | None = Field(
        default=None, gt=0, description="Time to first token (TTFT) of every call of the job, in seconds."
    )
    tpot_s: float | None = Field(
        default=None, gt=0, description="Mean time per output token (TPOT) of every call of the job, in seconds."
    )


@dataclass(frozen=True)
class CallRow:
    """One call of a job. All times are in seconds.

    - `asked_s`: time of the call, from the start of the run
    - `ttft_s`, `e2el_s`: from the call to its first and to its last token
    - `tpot_s`: mean time between two tokens; 0 for a single token
    - `itl_s`: times between successive messages of the engine. Each message carries one token, unless the summary's
      `stream_interval` says otherwise.
    """

    seat: str
    asked_s: float
    ttft_s: float
    e2el_s: float
    tpot_s: float
    itl_s: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class JobRow:
    """One job: a line of `jobs.jsonl`.

    `arrived_s` is in seconds from the start of the run, and `jct_s` in seconds from the arrival to the answer.
    `gib_seconds` and `engine_seconds` are the job's part of the engines' memory and time. `cost` is the price of that
    part, or None if the configuration has no price. `emulated` is True if the engines ran on an emulated device.
    """

    policy: str
    load: float
    repeat: int
    phase: str
    id: str
    arrived_s: float
    jct_s: float
    correct: bool | None
    error: str | None
    gib_seconds: float
    engine_seconds: float
    cost: float | None
    calls: tuple[CallRow, ...]
    emulated: bool = False


@dataclass(frozen=True)
class Moment:
    """One tick of the controller, a line of `decisions.jsonl`: what it saw and did.

    `at_s` is in seconds from the start of the run. `cause` is "tick", "a burst" and so on. `seconds` is the time from
    the snapshot until the memory was moved. `emulated` is True if the engines ran on an emulated device.
    """

    policy: str
    load: float
    repeat: int
    at_s: float
    cause: str
    engines: Mapping[str, EngineMoment]
    reasons: Worded
    moved_bytes: int
    seconds: float
    utilization: float | None = None
    emulated: bool = False


@dataclass(frozen=True)
class Run:
    """One policy at one load in one repeat, and its metrics. `order` is its place among the policies of the repeat."""

    policy: str
    load: float
    repeat: int
    order: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One policy at one load, and the spread of every metric over the repeats."""

    policy: str
    load: float
    metrics: Mapping[str, Spread]


@dataclass(frozen=True)
class Summary:
    """The content of `summary.json`.

    `kind` is "engines" for real engines and "simulation" for modelled ones. `limit` names the entry of `policies` that
    had memory for all engines, if there is one. It shows what is possible and does not compete. `stream_interval` is
    the number of tokens in one message of an engine. Results without this key have 64, whose time is divided equally in
    `itl_s`. `emulation` says on which emulated device the engines ran, or is None. Every output shows it.
    """

    kind: str
    workload: str
    config: str
    started: str
    seconds: float
    command: str
    machine: Mapping[str, str]
    slo: Slo
    policies: tuple[str, ...]
    limit: str | None
    loads: tuple[float, ...]
    repeats: int
    points: tuple[Point, ...]
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)
    stream_interval: int = 64
    emulation: str | None = None

    def point(self, policy: str, load: float) -> Point:
        """Return the metrics of one policy at one load. Raises KeyError if it did not run."""
        for point in self.points:
            if (point.policy, point.load) == (policy, load):
                return point
        raise KeyError((policy, load))


Row = TypeVar("Row")
_SUMMARY = TypeAdapter(Summary)
_JOB = TypeAdapter(JobRow)
_MOMENT = TypeAdapter(Moment)


def points(runs: Iterable[Run]) -> tuple[Point, ...]:
    """Return the spread of every metric over the repeats, with policies and loads in the order of their first run.

    A run can lack a metric: without a burst there is no reaction time. The spread is then over the runs that have it.
    """
    grouped: dict[tuple[str, float], dict[str, list[float]]] = {}
    for run in runs:
        by_metric = grouped.setdefault((run.policy, run.load), {})
        for name, value in run.metrics.items():
            by_metric.setdefault(name, []).append(value)
    return tuple(
        Point(policy, load, {name: Spread.of(values) for name, values in by_metric.items()})
        for (policy, load), by_metric in grouped.items()
    )


def write(folder: Path, summary: Summary) -> None:
    """Write `summary.json`. `Output` writes the other files while the benchmark runs."""
    data = json.loads(_SUMMARY.dump_json(summary))
    (folder / SUMMARY).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def job_line(row: JobRow) -> bytes:
    """Return a line of `jobs.jsonl`."""
    return _JOB.dump_json(row) + b"\n"


def moment_line(moment: Moment) -> bytes:
    """Return a line of `decisions.jsonl`."""
    return _MOMENT.dump_json(moment) + b"\n"


def read_summary(folder: Path) -> Summary:
    """Read `summary.json`. Raises InputError, which names the file and the key."""
    path = folder / SUMMARY
    try:
        return _SUMMARY.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder that `troupe bench` wrote") from None
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, 'the file', most=1)}") from None


def read_jobs(folder: Path) -> Iterator[JobRow]:
    """Yield the lines of `jobs.jsonl`. Raises InputError, which names the file, the line and the key."""
    yield from _lines(folder / JOBS, _JOB)


def read_moments(folder: Path) -> Iterator[Moment]:
    """Yield the lines of `decisions.jsonl`. Raises InputError, which names the file, the line and the key."""
    yield from _lines(folder / DECISIONS, _MOMENT)


def _lines(path: Path, kind: TypeAdapter[Row]) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield kind.validate_json(line)
                except ValidationError as error:
                    raise InputError(f"{path}, line {number}: {explain(error, 'the line', most=1)}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
