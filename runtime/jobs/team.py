"""Assembles a team from a configuration: the role, engine and sampling of each seat, and their workflow.

The runtime assembles the team before any engine starts, so that it reports an unknown role, a broken plug-in or a
missing seat at once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from agents import registry, yaml_role
from agents.names import nearest
from agents.role import Role, Sampling, Task, TaskRefused, Value, explain
from agents.tasks import CompareTask
from agents.workflow import Workflow
from agents.workflows.judged import Judged
from runtime.config import Config, Member, is_role_file, read_yaml
from runtime.errors import ConfigError, InputError, PluginError
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import Job

T = TypeVar("T")

PROBLEM_MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class Seat:
    """A place in the team: a role, its engine, its sampling, and the tools that its model may call.

    A reply has at most `max_tokens` tokens. If `max_tokens` is None, the role sets the limit for each task. The model
    may make `tool_calls_max` tool calls for one reply. The policies use `priority` and the fields after it;
    runtime.config.Member describes them.
    """

    name: str
    role: Role
    engine: str
    sampling: Sampling
    max_tokens: int | None = None
    tools: tuple[str, ...] = ()
    tool_calls_max: int = 8
    priority: int = 1
    minimum_share: float | None = None
    jct_slo_s: float | None = None
    slo_s: float | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


@dataclass(frozen=True)
class Team:
    """The seats by name, and the class and options of the workflow that calls them.

    `judge` names the seat that compares answers with expected answers. It is None if the team has no judge.
    """

    seats: Mapping[str, Seat]
    workflow: type[Workflow]
    options: Value
    judge: str | None = None

    def with_seats_of(self, others: Iterable["Team"]) -> "Team":
        """Return this team with the seats of other teams added, so that their engines and tools start too."""
        seats = {name: seat for other in others for name, seat in other.seats.items()}
        return replace(self, seats={**seats, **self.seats})

    def without_tools(self) -> "Team":
        """Return this team with seats that call no tools, for modelled engines, which cannot call tools."""
        seats = {name: replace(seat, tools=()) for name, seat in self.seats.items()}
        return replace(self, seats=seats)

    def begin(self, job: Job) -> Workflow:
        """Return a new workflow for a job's problem. If the comparison is JUDGE, the judge makes the last reply."""
        workflow = self.workflow(job.problem, self.options)
        if job.compare is not Comparison.JUDGE:
            return workflow
        assert self.judge is not None
        assert job.expected is not None
        return Judged(workflow, self.judge, job.expected)

    def check(self, problem: str, compare: Comparison | None = None) -> None:
        """Check that every role can handle a problem and that the team can compare its answer. Use no engine.

        Raise InputError if a check fails, or PluginError if a role's `check` raises any other error than TaskRefused.
        """
        if compare is Comparison.JUDGE and self.judge is None:
            raise InputError(
                "compare: the team has no judge; set `judge` in the configuration to a seat whose role takes "
                "CompareTask, such as judge, or compare in another way"
            )
        if not problem.strip():
            raise InputError("the problem is empty")
        if len(problem) > PROBLEM_MAX_CHARACTERS:
            raise InputError(f"the problem has {len(problem)} characters; at most {PROBLEM_MAX_CHARACTERS} are allowed")
        for seat in self.seats.values():
            try:
                seat.role.check(problem)
            except TaskRefused as error:
                raise InputError(str(error)) from None
            except Exception as error:  # a third party's role may raise anything
                raise PluginError(f"the role at {seat.name}: check() raised {error!r}") from error


def assemble(config: Config) -> Team:
    """Find the roles and the workflow that a configuration names, and check that they fit each other.

    Leave out the seats that the workflow does not call. Raise ConfigError, which names the key, or PluginError if a
    third party's role or workflow is broken.
    """
    workflow = _workflow(config)
    options = _options(config, workflow)
    needed = _needed(config, workflow, options)
    if config.judge is not None and config.judge not in config.team:
        raise ConfigError(
            f"{config.source}: judge: there is no seat {config.judge!r}; {nearest(config.judge, config.team)}"
        )
    for seat in needed:
        if seat not in config.team:
            raise ConfigError(
                f"{config.source}: team: the workflow {config.workflow.name} needs a {seat!r}; "
                f"the team has {', '.join(config.team)}"
            )
    seats = {name: _seat(config, name, member) for name, member in config.team.items() if name in needed}
    _check_fit(config, needed, seats)
    roles = {name: seat.role for name, seat in seats.items()}
    for fault in _plugin(config, "misfits()", lambda: list(workflow.misfits(options, roles))):
        raise ConfigError(f"{config.source}: {fault}")
    return Team(seats, workflow, options, config.judge)


def _check_fit(config: Config, needed: Mapping[str, tuple[type[Task], ...]], seats: Mapping[str, Seat]) -> None:
    """Raise ConfigError if a role does not take a task that its seat needs, or if a seat names an unknown tool."""
    for name, tasks in needed.items():
        missing = [task.__name__ for task in tasks if task not in seats[name].role.takes]
        if missing == [CompareTask.__name__] and name == config.judge:
            raise ConfigError(
                f"{config.source}: judge: the role of the seat {name!r}, {config.team[name].role!r}, does not take "
                "CompareTask; use a seat with the role judge"
            )
        if missing:
            takes = ", ".join(task.__name__ for task in seats[name].role.takes)
            raise ConfigError(
                f"{config.source}: team.{name}.role: {config.team[name].role!r} takes {takes}; "
                f"the workflow {config.workflow.name} also gives this seat {', '.join(missing)}"
            )
    for name, seat in seats.items():
        for tool in seat.tools:
            if tool not in config.tools:
                raise ConfigError(
                    f"{config.source}: team.{name}.tools: {tool!r} is not in `tools`; add `tools: {{{tool}: {{}}}}` to "
                    f"the configuration to allow it, or set team.{name}.tools: []; {nearest(tool, config.tools)}"
                )


def _plugin(config: Config, what: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except Exception as error:  # a third party's workflow may raise anything
        raise PluginError(f"{config.source}: workflow {config.workflow.name}: {what} raised {error!r}") from error


def _workflow(config: Config) -> type[Workflow]:
    try:
        return registry.find_workflow(config.workflow.name)
    except registry.UnknownName as error:
        raise ConfigError(f"{config.source}: workflow.name: {error}") from None
    except registry.BrokenPlugin as error:
        raise PluginError(f"{config.source}: workflow.name: {error}") from None


def _needed(config: Config, workflow: type[Workflow], options: Value) -> Mapping[str, tuple[type[Task], ...]]:
    needed = _plugin(config, "seats()", lambda: workflow.seats(options))
    if config.judge is None:
        return needed
    return {**needed, config.judge: (*needed.get(config.judge, ()), CompareTask)}


def _options(config: Config, workflow: type[Workflow]) -> Value:
    try:
        return workflow.Options.model_validate(dict(config.workflow.options))
    except ValidationError as error:
        known = ", ".join(["name", *workflow.Options.model_fields])
        raise ConfigError(f"{config.source}: workflow.{explain(error, 'options')}; known keys are {known}") from None


def _seat(config: Config, name: str, member: Member) -> Seat:
    role = _role(config, name, member)
    sampling = member.sampling(role.sampling)
    return Seat(
        name,
        role,
        member.engine,
        sampling,
        max_tokens=member.max_tokens,
        tools=role.tools if member.tools is None else member.tools,
        tool_calls_max=member.tool_calls_max,
        priority=member.priority,
        minimum_share=member.minimum_share,
        jct_slo_s=member.jct_slo_s,
        slo_s=member.slo_s,
        ttft_slo_s=member.ttft_slo_s,
        tpot_slo_s=member.tpot_slo_s,
    )


def _role(config: Config, seat: str, member: Member) -> Role:
    place = f"{config.source}: team.{seat}.role"
    if is_role_file(member.role):
        path = Path(member.role)
        try:
            return yaml_role.from_mapping(read_yaml(path), str(path))
        except (ConfigError, yaml_role.SpecError) as error:
            raise ConfigError(f"{place}: {error}") from None
    try:
        return registry.find_role(member.role)()
    except registry.UnknownName as error:
        raise ConfigError(f"{place}: {error}") from None
    except registry.BrokenPlugin as error:
        raise PluginError(f"{place}: {error}") from None
