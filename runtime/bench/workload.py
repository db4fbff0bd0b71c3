"""Workloads: YAML files that say which problems arrive when, and by which workflow they are worked.

There are three kinds of load. The same seed always draws the same arrivals.

- Open loop: jobs arrive at a rate, whether or not earlier jobs have ended. Gaps between arrivals are gamma-distributed.
  `burstiness` is the shape of that distribution, as in `vllm bench serve`: 1 is a Poisson process, less is burstier,
  and more is more even.
- Closed loop: a fixed number of jobs is open at any time.
- Trace: each line of a file gives the arrival time of a job.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from agents.role import Value
from runtime.bench.results import Slo
from runtime.config import SHIPPED, complaint, find, read_yaml
from runtime.errors import ConfigError, InputError
from runtime.jobs import problems
from runtime.jobs.problems import Problem

FOLDER = SHIPPED / "workloads"
LENGTH_MAX = 1_000_000
"""Upper bound for the lengths of prompts and replies, in tokens."""


class Phase(Value):
    """A period of one kind of load: open loop with `jobs_per_s`, closed loop with `concurrency`."""

    name: str = Field(min_length=1, description="Name of the phase, unique in its workload.")
    seconds: float = Field(gt=0, le=86400, description="Seconds for which jobs arrive.")
    jobs_per_s: float | None = Field(
        default=None, ge=0, le=1e5, description="Rate of arrivals in an open loop. 0 makes a gap."
    )
    burstiness: float = Field(
        default=1,
        gt=0,
        le=1e3,
        description="Shape of the gamma distribution of the gaps between arrivals. 1 is a Poisson process, and less is "
        "burstier.",
    )
    concurrency: int | None = Field(
        default=None, ge=1, le=100_000, description="Number of jobs that a closed loop keeps open."
    )
    workflow: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Name and options of the workflow. Other options keep the configuration's value if the workflow is "
        "the same, and have their default otherwise.",
    )
    characters: tuple[int, int] | None = Field(
        default=None, description="Shortest and longest problem to draw, in characters. By default any length."
    )

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> Self:
        if (self.jobs_per_s is None) == (self.concurrency is None):
            raise ValueError("give jobs_per_s (open loop) or concurrency (closed loop)")
        return self


def _in_order(bounds: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= bounds[0] <= bounds[1] <= LENGTH_MAX:
        raise ValueError(f"give the shortest and the longest length, from 1 to {LENGTH_MAX}, such as [300, 1500]")
    return bounds


Bounds = Annotated[tuple[int, int], AfterValidator(_in_order)]


class Lengths(Value):
    """The lengths of the prompts and replies of a modelled engine, in tokens. They are lognormal."""

    prompt: Bounds = Field(description="Shortest and longest prompt, in tokens.")
    reply: Bounds = Field(description="Shortest and longest reply, in tokens.")


class Workload(Value):
    """The content of a workload file: either phases or a trace."""

    problems: str = Field(
        default="../problems/held-out.jsonl",
        description="File of problems to draw from, in the format of `troupe solve --file`. A relative path starts at "
        "the folder of the workload.",
    )
    phases: tuple[Phase, ...] = Field(default=(), description="The phases, in order.")
    trace: str | None = Field(
        default=None,
        description="File of arrivals instead of phases, one JSON object a line: "
        '{"at_s", "problem", "answer", "compare"}.',
    )
    cycles: int = Field(default=1, ge=1, le=10_000, description="The number of times that the phases are played.")
    loads: tuple[float, ...] = Field(
        default=(1.0,),
        min_length=1,
        description="Multiples of the rates. The workload runs once at each.",
    )
    slo: Slo = Field(default=Slo(), description="The limits that a good job meets.")
    lengths: Mapping[str, Lengths] = Field(
        default_factory=dict,
        description="Lengths of prompts and replies by the name of a modelled engine, for `troupe simulate load` only. "
        "An engine without lengths counts the words of its texts.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.phases) == (self.trace is not None):
            raise ValueError("give either phases or a trace")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError("phases: two phases have the same name; give each its own")
        if any(not 0 < load <= 1000 for load in self.loads):
            raise ValueError("loads: every load must be above 0 and at most 1000")
        return self

    @property
    def seconds(self) -> float:
        """Return how long jobs arrive, in seconds; 0 for a trace."""
        return self.cycles * sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True)
class Arrival:
    """The arrival of one job, `at_s` seconds after the start."""

    at_s: float
    phase: str
    problem: Problem


@dataclass(frozen=True)
class ClosedPhase:
    """A phase that keeps `concurrency` jobs open from `at_s`, for `seconds`. It takes the problems in turn."""

    at_s: float
    seconds: float
    phase: str
    concurrency: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Schedule:
    """A drawn workload: every arrival and every closed-loop phase."""

    arrivals: tuple[Arrival, ...]
    closed: tuple[ClosedPhase, ...]


@dataclass(frozen=True)
class Source:
    """A workload and the problems or arrivals from the files that it names."""

    name: str
    workload: Workload
    problems: tuple[Problem, ...]
    trace: tuple[Arrival, ...] = ()

    def at_rate(self, factor: float) -> "Source":
        """Return a source whose open-loop phases have their rates multiplied by a factor."""
        phases = tuple(
            phase.model_copy(update={"jobs_per_s": phase.jobs_per_s * factor}) if phase.jobs_per_s else phase
            for phase in self.workload.phases
        )
        return replace(self, workload=self.workload.model_copy(update={"phases": phases}))

    def draw(self, load: float, seed: int) -> Schedule:
        """Return the arrivals at a load. They depend only on the load and the seed, so every policy gets the same."""
        if self.trace:
            return Schedule(tuple(Arrival(a.at_s / load, a.phase, a.problem) for a in self.trace), ())
        arrivals: list[Arrival] = []
        closed: list[ClosedPhase] = []
        start_s = 0.0
        for cycle in range(self.workload.cycles):
            for phase in self.workload.phases:
                rng = random.Random(f"{seed}/{cycle}/{phase.name}")
                candidates = self._candidates(phase)
                if phase.concurrency is not None:
                    order = tuple(rng.sample(candidates, len(candidates)))
                    count = max(1, round(phase.concurrency * load))
                    closed.append(ClosedPhase(start_s, phase.seconds, phase.name, count, order))
                else:
                    arrivals += _open_loop(phase, load, start_s, candidates, rng)
                start_s += phase.seconds
        return Schedule(tuple(arrivals), tuple(closed))

    def _candidates(self, phase: Phase) -> Sequence[Problem]:
        low, high = phase.characters or (0, 1 << 30)
        candidates = [problem for problem in self.problems if low <= len(problem.problem) <= high]
        if not candidates:
            raise ConfigError(
                f"workload {self.name}: phases.{phase.name}.characters: no problem has {low} to {high} characters"
            )
        return candidates


def _open_loop(
    phase: Phase, load: float, start_s: float, candidates: Sequence[Problem], rng: random.Random
) -> list[Arrival]:
    assert phase.jobs_per_s is not None
    rate = phase.jobs_per_s * load
    if not rate:
        return []
    scale_s = 1 / (rate * phase.burstiness)
    arrivals: list[Arrival] = []
    at_s = start_s
    while (at_s := at_s + rng.gammavariate(phase.burstiness, scale_s)) < start_s + phase.seconds:
        arrivals.append(Arrival(at_s, phase.name, rng.choice(candidates)))
    return arrivals


def load(name: str) -> Source:
    """Read a workload, given by its path or by the name of a shipped one.

    Raises ConfigError or InputError, which names the file and the key or line.
    """
    path = find(name, FOLDER, "workload")
    try:
        workload = Workload.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {complaint(dict(e), Workload)}" for e in error.errors())) from None
    if workload.trace is not None:
        return Source(path.stem, workload, (), read_trace(path.parent / workload.trace))
    asked = problems.read(path.parent / workload.problems)
    if faults := [problem.fault for problem in asked if problem.fault]:
        raise InputError(faults[0])
    source = Source(path.stem, workload, tuple(asked))
    source.draw(1, 0)  # raises now if a phase has no problem to draw
    return source


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """Read the arrivals of a trace, sorted by time. Raises InputError, which names the file, the line and the key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    arrivals = [_trace_line(text, f"{path}, line {n}", n) for n, text in enumerate(lines, start=1) if text.strip()]
    if not arrivals:
        raise InputError(
            f"{path}: the file has no lines; write one for each job, such as "
            '{"at_s": 0.5, "problem": "12+7", "answer": "19"}'
        )
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


def _trace_line(text: str, place: str, number: int) -> Arrival:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from None
    if not isinstance(data, dict) or (unknown := sorted(set(data) - {"at_s", "problem", "answer", "compare", "id"})):
        complaint = f"unknown key {unknown[0]!r}" if isinstance(data, dict) else "not an object"
        raise InputError(f"{place}: {complaint}; give an object with the keys at_s, problem, answer, compare and id")
    at_s, problem = data.get("at_s"), data.get("problem")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s < 1e9:
        raise InputError(f"{place}: at_s: give the seconds from the start, at least 0, not {at_s!r}")
    if not isinstance(problem, str) or not problem.strip():
        raise InputError(f"{place}: problem: give a text, not {problem!r}")
    try:
        expected, compare = problems.expectation(data.get("answer"), data.get("compare"))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return Arrival(at_s, "trace", Problem(str(data.get("id", number)), problem, expected, compare=compare))
