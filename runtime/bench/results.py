"""What a benchmark leaves in its folder, typed: `summary.json`, `jobs.jsonl` and `decisions.jsonl`.

Metrics have the names and units of `vllm bench serve`: times of calls in milliseconds (ttft, tpot, itl, e2el),
throughput per second. Those of jobs (jct) are in seconds.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from runtime.control.policy import Worded
from runtime.control.snapshot import EngineMoment
from runtime.errors import InputError

SUMMARY, JOBS, DECISIONS = "summary.json", "jobs.jsonl", "decisions.jsonl"


@dataclass(frozen=True)
class Spread:
    """A metric over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Slo:
    """What a job has to meet to count as good: seconds; None is no limit. Times of calls are each job's worst."""

    jct_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True)
class CallRow:
    """One call of a job. Seconds: when it was asked, counted from the run's start; to its first token; to its last; the
    mean between two tokens (0 for a single one); between each two messages from the engine, of a token each unless the
    summary's `stream_interval` says otherwise."""

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
    """One job: a line of `jobs.jsonl`. `arrived_s` counts from the run's start, `jct_s` from the arrival to the answer.

    `gib_seconds` and `engine_seconds` are its part of the engines' memory and time, `cost` what that came to where the
    configuration has a price.
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


@dataclass(frozen=True)
class Moment:
    """What the controller saw and did at one tick, `at_s` after the run's start: a line of `decisions.jsonl`.

    `seconds` is from looking to memory being moved; `cause` "tick", "a burst", ...
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


@dataclass(frozen=True)
class Run:
    """One policy at one load in one repeat, and its metrics."""

    policy: str
    load: float
    repeat: int
    order: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One policy at one load: every metric over the repeats."""

    policy: str
    load: float
    metrics: Mapping[str, Spread]


@dataclass(frozen=True)
class Summary:
    """`summary.json`. `limit` names the policy, if any, that had memory for everyone: no rival but what is possible.

    `kind` is "engines" for real ones and "simulation" otherwise. `stream_interval` is how many tokens of a reply came
    together: results that do not say it have 64, each of which has an equal part of the time in `itl_s`.
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

    def point(self, policy: str, load: float) -> Point:
        """The figures of one policy at one load. Raises KeyError."""
        for point in self.points:
            if (point.policy, point.load) == (policy, load):
                return point
        raise KeyError((policy, load))


Row = TypeVar("Row")
_SUMMARY = TypeAdapter(Summary)
_JOB = TypeAdapter(JobRow)
_MOMENT = TypeAdapter(Moment)


def points(runs: Iterable[Run]) -> tuple[Point, ...]:
    """The spread of every metric over the repeats, in the order in which policies and loads first come. A metric that a
    run does not have (of bursts, where there was none) is spread over those that have it."""
    grouped: dict[tuple[str, float], dict[str, list[float]]] = {}
    for run in runs:
        found = grouped.setdefault((run.policy, run.load), {})
        for name, value in run.metrics.items():
            found.setdefault(name, []).append(value)
    return tuple(
        Point(policy, load, {name: Spread.of(values) for name, values in found.items()})
        for (policy, load), found in grouped.items()
    )


def write(folder: Path, summary: Summary) -> None:
    """Write `summary.json`; the other files are written as the runs go."""
    data = json.loads(_SUMMARY.dump_json(summary))
    (folder / SUMMARY).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def job_line(row: JobRow) -> bytes:
    """A line of `jobs.jsonl`."""
    return _JOB.dump_json(row) + b"\n"


def moment_line(moment: Moment) -> bytes:
    """A line of `decisions.jsonl`."""
    return _MOMENT.dump_json(moment) + b"\n"


def read_summary(folder: Path) -> Summary:
    """Raises InputError, naming the key."""
    path = folder / SUMMARY
    try:
        return _SUMMARY.validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder that `troupe bench` wrote") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def read_jobs(folder: Path) -> Iterator[JobRow]:
    """The lines of `jobs.jsonl`. Raises InputError, naming line and key."""
    yield from _lines(folder / JOBS, _JOB)


def read_moments(folder: Path) -> Iterator[Moment]:
    """The lines of `decisions.jsonl`. Raises InputError, naming line and key."""
    yield from _lines(folder / DECISIONS, _MOMENT)


def _lines(path: Path, kind: TypeAdapter[Row]) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield kind.validate_json(line)
                except ValidationError as error:
                    raise InputError(f"{path}, line {number}: {_first(error)}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
