"""A workload: which problems come when, and how they are worked. Read from YAML, drawn the same from the same seed.

Open loop: jobs come at a rate, whatever becomes of those before them; gaps are gamma-distributed, and `burstiness` is
the distribution's shape as in `vllm bench serve`: 1 is Poisson, less comes in bursts, more evens out. Closed loop: so
many jobs are open at all times. A trace: jobs come when its lines say.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from runtime.bench.results import Slo
from runtime.config import SHIPPED, Section, read_yaml
from runtime.errors import ConfigError, InputError
from runtime.jobs import problems
from runtime.jobs.problems import Problem

FOLDER = SHIPPED / "workloads"


class Phase(Section):
    """So many seconds of one kind of load. `workflow` is a name and options over the configuration's own;
    `characters` bounds the length of the problems that are drawn."""

    name: str = Field(min_length=1)
    seconds: float = Field(gt=0, le=86400)
    jobs_per_s: float | None = Field(default=None, gt=0, le=1e5)
    burstiness: float = Field(default=1, gt=0, le=1e3)
    concurrency: int | None = Field(default=None, ge=1, le=100_000)
    workflow: Mapping[str, Any] = Field(default_factory=dict)
    characters: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.jobs_per_s is None) == (self.concurrency is None):
            raise ValueError("give jobs_per_s (open loop) or concurrency (closed loop)")
        return self


class SloSection(Section):
    """Limits in seconds; see results.Slo."""

    jct_s: float | None = Field(default=None, gt=0)
    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)


class Workload(Section):
    """Phases in order, `cycles` times over; or a `trace`, a file of lines {"at_s", "problem", "answer"}.

    `loads` multiply the rates, one run each. `problems` is a file as for `troupe solve --file`.
    """

    problems: str = "../problems/held-out.jsonl"
    phases: tuple[Phase, ...] = ()
    trace: str | None = None
    cycles: int = Field(default=1, ge=1, le=10_000)
    loads: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    slo: SloSection = SloSection()

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if bool(self.phases) == (self.trace is not None):
            raise ValueError("give phases or a trace")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError("phases: two have the same name")
        if any(not 0 < load <= 1000 for load in self.loads):
            raise ValueError("loads: each is above 0 and at most 1000")
        return self

    @property
    def limits(self) -> Slo:
        """The SLO as results carry it."""
        return Slo(self.slo.jct_s, self.slo.ttft_s, self.slo.tpot_s)

    @property
    def seconds(self) -> float:
        """How long jobs go on coming; 0 for a trace."""
        return self.cycles * sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True)
class Arrival:
    """One job of a workload: when it comes (seconds from the start), in which phase, and the problem."""

    at_s: float
    phase: str
    problem: Problem


@dataclass(frozen=True)
class ClosedPhase:
    """So many jobs at all times from `at_s` on, for `seconds`, of these problems in turn."""

    at_s: float
    seconds: float
    phase: str
    concurrency: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Script:
    """A workload drawn: what comes when."""

    arrivals: tuple[Arrival, ...]
    closed: tuple[ClosedPhase, ...]


@dataclass(frozen=True)
class Source:
    """A workload with the problems that it names."""

    name: str
    workload: Workload
    problems: tuple[Problem, ...]
    trace: tuple[Arrival, ...] = ()

    def draw(self, load: float, seed: int) -> Script:
        """What comes when, at a load; the same for the same seed, and for every policy."""
        if self.trace:
            return Script(tuple(Arrival(a.at_s / load, a.phase, a.problem) for a in self.trace), ())
        arrivals: list[Arrival] = []
        closed: list[ClosedPhase] = []
        start_s = 0.0
        for cycle in range(self.workload.cycles):
            for phase in self.workload.phases:
                rng = random.Random(f"{seed}/{cycle}/{phase.name}")
                drawn = self._of(phase)
                if phase.concurrency is not None:
                    order = tuple(rng.sample(drawn, len(drawn)))
                    count = max(1, round(phase.concurrency * load))
                    closed.append(ClosedPhase(start_s, phase.seconds, phase.name, count, order))
                else:
                    arrivals += _open(phase, load, start_s, drawn, rng)
                start_s += phase.seconds
        return Script(tuple(arrivals), tuple(closed))

    def _of(self, phase: Phase) -> Sequence[Problem]:
        low, high = phase.characters or (0, 1 << 30)
        found = [problem for problem in self.problems if low <= len(problem.problem) <= high]
        if not found:
            raise ConfigError(f"workload {self.name}: phases.{phase.name}.characters: no problem is that long")
        return found


def _open(phase: Phase, load: float, start_s: float, drawn: Sequence[Problem], rng: random.Random) -> list[Arrival]:
    assert phase.jobs_per_s is not None
    rate = phase.jobs_per_s * load
    arrivals: list[Arrival] = []
    at_s = start_s
    while (at_s := at_s + rng.gammavariate(phase.burstiness, 1 / (rate * phase.burstiness))) < start_s + phase.seconds:
        arrivals.append(Arrival(at_s, phase.name, rng.choice(drawn)))
    return arrivals


def load(name: str) -> Source:
    """A workload by its file or, for a shipped one, by name. Raises ConfigError or InputError: file, key or line."""
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ConfigError(f"there is no file {name!r}, and no shipped workload of that name; known: {shipped}")
    try:
        workload = Workload.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_complaint(dict(e))}" for e in error.errors())) from None
    if workload.trace is not None:
        return Source(path.stem, workload, (), read_trace(path.parent / workload.trace))
    asked = problems.read(path.parent / workload.problems)
    if faults := [problem.fault for problem in asked if problem.fault]:
        raise InputError(faults[0])
    source = Source(path.stem, workload, tuple(asked))
    source.draw(1, 0)  # a phase that finds no problem is told now
    return source


def read_trace(path: Path) -> tuple[Arrival, ...]:
    """The lines of a trace, by time. Raises InputError with line and key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    arrivals = [_trace_line(text, f"{path}, line {n}", n) for n, text in enumerate(lines, start=1) if text.strip()]
    if not arrivals:
        raise InputError(f'{path}: no lines; write such as {{"at_s": 0.5, "problem": "12+7", "answer": "19"}}')
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


def _trace_line(text: str, place: str, number: int) -> Arrival:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from None
    if not isinstance(data, dict) or (unknown := sorted(set(data) - {"at_s", "problem", "answer", "id"})):
        extra = f"unknown key {unknown[0]!r}" if isinstance(data, dict) else "not an object"
        raise InputError(f"{place}: {extra}; known are at_s, problem, answer and id")
    at_s, problem, answer = data.get("at_s"), data.get("problem"), data.get("answer")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s < 1e9:
        raise InputError(f"{place}: at_s: seconds from the start, a number not below 0, not {at_s!r}")
    if not isinstance(problem, str) or not problem.strip():
        raise InputError(f"{place}: problem: a text, not {problem!r}")
    return Arrival(
        at_s, "trace", Problem(str(data.get("id", number)), problem, None if answer is None else str(answer))
    )


def _complaint(error: dict[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        kinds: dict[str, type[Section]] = {"phases": Phase, "slo": SloSection}
        known = kinds.get(str(error["loc"][0]), Workload) if len(error["loc"]) > 1 else Workload
        return f"{place}: unknown key; known: {', '.join(known.model_fields)}"
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return f"{place}: {message}" if place else message
