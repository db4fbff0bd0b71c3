"""The plan of a benchmark: its policies, loads and teams from the options of a command, and the summary of its runs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agents.names import nearest
from runtime.bench import results
from runtime.bench.output import command, default_folder, machine
from runtime.bench.results import Summary
from runtime.bench.runner import LIMIT, STREAM_INTERVAL, Rival
from runtime.bench.workload import Source
from runtime.config import Config, PolicyChoice, ResidencyChoice
from runtime.control import catalogue
from runtime.engines.step_time import StepTime
from runtime.errors import ConfigError, InputError
from runtime.jobs.team import Team, assemble
from runtime.residency import catalogue as residency_catalogue


@dataclass(frozen=True)
class Plan:
    """The runs of a benchmark and their folder. With `step_times`, engines take turns on an emulated device."""

    config: Config
    source: Source
    rivals: list[Rival]
    loads: tuple[float, ...]
    repeats: int
    limit: bool
    out: Path | None
    step_times: Mapping[str, StepTime] = field(default_factory=dict)
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.out or default_folder(self.source.name))

    @property
    def emulation(self) -> str | None:
        """Return what every output says about the emulated device, or None if there is none."""
        if not self.step_times:
            return None
        times = ", ".join(f"{step_time} ({engine})" for engine, step_time in self.step_times.items())
        return f"emulated device: CPU engines take turns, at least {times} a step; these are not a GPU's figures"

    @property
    def runs(self) -> int:
        """Return the number of plays of the workload, including the warm-up."""
        return (len(self.rivals) + self.limit) * len(self.loads) * self.repeats + 1


def rivals(policies: str) -> list[Rival]:
    """Return the policies that `--policies` names. Raises ConfigError for an unknown or repeated one."""
    names = _names("--policies", policies)
    for name in names:
        catalogue.make(name, place="--policies")
    return [Rival(name, PolicyChoice(name=name)) for name in names]


def residency_rivals(policies: str, config: Config) -> list[Rival]:
    """Return the residency policies that `--residency` names, each beside the configuration's policy.

    An option of a policy follows its name, as in `ttl:idle_s=5`. Raises ConfigError for an unknown or repeated one.
    """
    if not any(config.may_sleep(name) for name in config.engines):
        raise ConfigError(f"{config.source}: residency.policy: no engine may sleep; choose another policy than keep")
    chosen = []
    for name in _names("--residency", policies):
        policy, *options = name.split(":")
        choice = ResidencyChoice.model_validate({"name": policy, **dict(option.split("=", 1) for option in options)})
        residency_catalogue.make(choice.name, choice.options, place="--residency")
        chosen.append(Rival(name, config.control.policy, residency=choice))
    return chosen


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{option}: give at least one policy, and none twice, not {text!r}")
    return names


def parse_loads(text: str | None, source: Source) -> tuple[float, ...]:
    """Return the loads that `--loads` names, or the workload's own. Raises InputError for a wrong one."""
    if text is None:
        return source.workload.loads
    try:
        loads = tuple(float(part) for part in text.split(","))
    except ValueError:
        loads = ()
    if not loads or not all(0 < load <= 1000 for load in loads) or len(set(loads)) < len(loads):
        raise InputError(
            f"--loads: give numbers above 0 and at most 1000, separated by commas, none twice, not {text!r}"
        )
    return loads


def parse_step_times(text: str | None, config: Config) -> dict[str, StepTime]:
    """Return the step time of each engine that `--emulate` gives, or none without it.

    Raises InputError for a wrong time, and if not every engine of the configuration has exactly one.
    """
    if text is None:
        return {}
    step_times: dict[str, StepTime] = {}
    for part in text.split(","):
        engine, _, value = (piece.strip() for piece in part.partition("="))
        if engine not in config.engines:
            raise InputError(f"--emulate: there is no engine {engine!r}; {nearest(engine, config.engines)}")
        if engine in step_times:
            raise InputError(f"--emulate: give the engine {engine} once")
        step_times[engine] = _step_time(engine, value)
    if missing := [engine for engine in config.engines if engine not in step_times]:
        raise InputError(f"--emulate: give every engine a step time; these have none: {', '.join(missing)}")
    return step_times


def _step_time(engine: str, text: str) -> StepTime:
    try:
        times_ms = [float(part) for part in text.split("+")]
    except ValueError:
        times_ms = []
    if not 1 <= len(times_ms) <= 2 or not all(0 < time_ms <= 10_000 for time_ms in times_ms):
        raise InputError(
            f"--emulate: give {engine} milliseconds above 0 and at most 10000, such as {engine}=8 or {engine}=8+0.1, "
            f"not {text!r}"
        )
    return StepTime(*times_ms)


def phase_teams(config: Config, source: Source) -> dict[str, Team]:
    """Return the team of each phase: that of the configuration, with the phase's own workflow and options.

    Raises ConfigError if a phase's workflow or option is wrong, and InputError if its team cannot work a problem.
    """
    teams = {"trace": assemble(config)} if source.trace else {}
    for phase in () if source.trace else source.workload.phases:
        name = phase.workflow.get("name", config.workflow.name)
        base = dict(config.workflow.options) if name == config.workflow.name else {}
        changed = type(config.workflow).model_validate({**base, **phase.workflow, "name": name})
        try:
            teams[phase.name] = assemble(config.model_copy(update={"workflow": changed}))
        except ConfigError as error:
            raise ConfigError(f"workload {source.name}: phases.{phase.name}.workflow: {error}") from None
    for team in teams.values():
        for problem in source.problems:
            team.check(problem.problem, problem.compare)
    return teams


def taking_part(plan: Plan, device_bytes: int) -> list[Rival]:
    """Return the policies of the plan and, if it asks for it, the run with memory for all engines."""
    if not plan.limit:
        return plan.rivals
    if plan.rivals[0].residency:
        limit = Rival(LIMIT, plan.config.control.policy, device_bytes, ResidencyChoice(name="keep"))
    else:
        limit = Rival(LIMIT, PolicyChoice(name="static"), device_bytes)
    return [*plan.rivals, limit]


def summarise(plan: Plan, kind: str, started: tuple[str, float], runs: list[results.Run]) -> Summary:
    """Write the summary of all runs to the plan's folder, and return it."""
    summary = Summary(
        kind=kind,
        workload=plan.source.name,
        config=plan.config.source.name,
        started=started[0],
        seconds=round(time.monotonic() - started[1], 1),
        command=command(),
        machine=machine(),
        slo=plan.source.workload.slo,
        policies=tuple(dict.fromkeys(run.policy for run in runs)),
        limit=LIMIT if plan.limit else None,
        loads=plan.loads,
        repeats=plan.repeats,
        points=results.points(runs),
        runs=tuple(runs),
        stream_interval=STREAM_INTERVAL,
        emulation=plan.emulation,
    )
    results.write(plan.folder, summary)
    return summary
