"""Puts a running team together: its engines, the controller that resizes them, and the orchestrator that runs jobs."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

from runtime.config import Config, Control, PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.controller import Controller
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.forecast import Forecast
from runtime.control.snapshotter import EngineRequirements, Snapshotter
from runtime.engines import replicas
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec, oversubscribe
from runtime.engines.step_time import StepTime
from runtime.errors import ConfigError, EngineError, PluginError
from runtime.events import CallPaused, EngineChanged, Event, JobAdvanced, Listener, ignore
from runtime.jobs.orchestrator import STREAM_INTERVAL, Orchestrator
from runtime.jobs.team import Seat, Team
from runtime.residency import catalogue
from runtime.residency.call_times import CallTimes
from runtime.residency.keeper import Keeper, Rules
from runtime.residency.policy import ResidencyPolicy
from runtime.telemetry.reading import Reading
from runtime.telemetry.sampler import Sampler, best_source
from runtime.tools import catalogue as tool_catalogue
from runtime.tools.tool import ToolSource
from runtime.tools.toolbox import Toolbox

Publish = Callable[[Record], None]
"""A function that the controller calls with the record of each decision."""


class RunningTeam:
    """A team whose engines have started, with their controller, keeper and orchestrator.

    The engines may be real or modelled. While the team's context is entered, `controller` resizes the engines, and
    `keeper` puts them to sleep and wakes them. `orchestrator` runs jobs of `team`.
    """

    def __init__(
        self,
        team: Team,
        engines: Mapping[str, EngineHandle],
        sharing: Sharing,
        control: Control,
        policies: ContainedPolicies,
        *,
        listener: Listener = ignore,
        publish: Publish = lambda record: None,
        reading: Callable[[], Reading] | None = None,
        log: DecisionLog | None = None,
        residency: ResidencyPolicy | None = None,
        may_sleep: Collection[str] = (),
        toolbox: Toolbox | None = None,
    ) -> None:
        self.team = team
        self.toolbox = toolbox or Toolbox()
        self.engines = engines
        self._replicas = replicas.single(engines)
        self.sharing = sharing
        self._price = control.price_per_gpu_hour
        self._listener = listener
        self._forecast = Forecast()
        self._call_times = CallTimes()
        self._policies = policies
        requirements = engine_requirements(team)
        self.controller = Controller(
            engines,
            sharing,
            Snapshotter(engines, self._forecast, requirements, reading),
            policies.policy,
            every_s=control.every_s,
            grace_s=control.grace_s,
            shadow=policies.shadow,
            log=log,
            publish=publish,
        )
        rules = {name: Rules(name in may_sleep, terms.priority) for name, terms in requirements.items()}
        self._may_sleep = may_sleep
        self.keeper = Keeper(
            engines,
            sharing,
            self._forecast,
            self._call_times,
            residency or catalogue.make("keep"),
            rules,
            self.controller.wake,
        )
        self.orchestrator = self.orchestrate(team)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as owned:
            await owned.enter_async_context(self.controller)
            if self._may_sleep:
                await owned.enter_async_context(self.keeper)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()

    def orchestrate(self, team: Team, stream_interval: int = STREAM_INTERVAL) -> Orchestrator:
        """Return an orchestrator that runs jobs of a team on these engines.

        Its events go to the forecast, the controller and the listener. `stream_interval` is the number of tokens that
        an engine sends at once.
        """
        engine_of = {seat.name: seat.engine for seat in team.seats.values()}
        self._forecast.seat(engine_of)
        self._call_times.seat(engine_of)
        return Orchestrator(team, self._replicas, self._on_event, self._price, stream_interval, self.toolbox)

    def use_policy(self, choice: PolicyChoice) -> None:
        """Replace the active policy. Raises ConfigError or PluginError if the new one is invalid, and keeps the old."""
        self.controller.use(self._policies.contain(choice, "policy"))

    def generate(self, engine: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request that belongs to no job. An engine that sleeps wakes for it.

        The controller checks for a burst at once.
        """
        self.controller.look()
        self.keeper.look()
        return self._replicas[engine].generate(request)

    def _on_event(self, event: Event) -> None:
        self._forecast.on_event(event)
        self._call_times.on_event(event)
        self.controller.on_event(event)
        if isinstance(event, JobAdvanced | CallPaused):
            self.keeper.look()
        self._listener(event)


@asynccontextmanager
async def start_team(
    config: Config,
    team: Team,
    folder: Path,
    listener: Listener = ignore,
    publish: Publish = lambda record: None,
    step_times: Mapping[str, StepTime] | None = None,
) -> AsyncIterator[RunningTeam]:
    """Start a team's engines, telemetry and controller; stop them when the context is left.

    The engines log to `folder`, and the controller writes its decisions to `decisions.jsonl` in it. Engines in
    `step_times` take turns on an emulated device, for their step time. Raises ConfigError or PluginError if a policy or
    a tool cannot be used, before any engine starts, and EngineError if an engine does not start.
    """

    def on_state(engine: str, state: EngineState, seconds: float) -> None:
        listener(EngineChanged(engine, state, seconds))

    async with AsyncExitStack() as owned:
        policies = owned.enter_context(ContainedPolicies(config.control.policy, config.control.shadow))
        residency = catalogue.make(config.residency.policy.name, config.residency.policy.options)
        toolbox = await owned.enter_async_context(Toolbox(needed_tools(config, team)))
        specs = needed_engines(config, team)
        may_sleep = [name for name in specs if config.may_sleep(name)]
        fleet = await owned.enter_async_context(
            Fleet(
                specs,
                folder,
                on_state,
                config.device.memory_bytes,
                kv_cache_bytes=config.device.kv_cache_memory_bytes,
                step_times=step_times,
                one_at_a_time=oversubscribe(specs.values()),
                may_sleep=may_sleep,
                host_memory_bytes=config.residency.host_memory_bytes,
            )
        )
        _check_that_each_can_wake(fleet, may_sleep)
        on_gpu = any(engine.limits.device_uuid for engine in fleet.engines.values())
        sampler = await owned.enter_async_context(Sampler(best_source(on_gpu)))
        log = owned.enter_context(DecisionLog(folder / "decisions.jsonl"))
        running = RunningTeam(
            team,
            fleet.engines,
            fleet.sharing,
            config.control,
            policies,
            listener=listener,
            publish=publish,
            reading=lambda: sampler.latest,
            log=log,
            residency=residency,
            may_sleep=may_sleep,
            toolbox=toolbox,
        )
        await owned.enter_async_context(running)
        yield running


def _check_that_each_can_wake(fleet: Fleet, may_sleep: Collection[str]) -> None:
    """Raise EngineError if the largest engine that may sleep cannot wake beside those that may not."""
    needed = {name: each.limits.smallest_bytes for name, each in fleet.engines.items()}
    asleep = {name: fleet.engines[name].asleep_bytes for name in may_sleep}
    least_bytes = sum((needed | asleep).values())
    budget_bytes = fleet.sharing.ledger.budget_bytes
    for name in may_sleep:
        if least_bytes + needed[name] - asleep[name] > budget_bytes:
            raise EngineError(
                f"engine {name} can never wake: it needs {needed[name]} bytes, and the other engines need "
                f"{least_bytes - asleep[name]} of the {budget_bytes} bytes even while all that may sleep do; let more "
                "engines sleep, or use smaller models"
            )


def needed_engines(config: Config, team: Team) -> dict[str, EngineSpec]:
    """Return the engines that the team's seats use. An engine that only a left-out seat names is not started."""
    return {name: config.engines[name] for name in dict.fromkeys(seat.engine for seat in team.seats.values())}


def needed_tools(config: Config, team: Team) -> dict[str, ToolSource]:
    """Return the sources of the tools that the team's seats name.

    Raises ConfigError or PluginError if one cannot be used.
    """
    names = dict.fromkeys(name for seat in team.seats.values() for name in seat.tools)
    tools = {name: config.tools[name] for name in names}
    try:
        return {name: tool_catalogue.make(name, tool.function, tool.mcp, tool.options) for name, tool in tools.items()}
    except (ConfigError, PluginError) as error:
        raise type(error)(f"{config.source}: {error}") from error


def engine_requirements(team: Team) -> dict[str, EngineRequirements]:
    """Return what each engine's seats declare together.

    That is the most urgent priority, the sum of the minimum shares, and the shortest of each objective.
    """
    seats_of: defaultdict[str, list[Seat]] = defaultdict(list)
    for seat in team.seats.values():
        seats_of[seat.engine].append(seat)
    return {engine: _combined_requirements(seats) for engine, seats in seats_of.items()}


def _combined_requirements(seats: Sequence[Seat]) -> EngineRequirements:
    minimum_shares = [seat.minimum_share for seat in seats if seat.minimum_share is not None]
    return EngineRequirements(
        priority=min(seat.priority for seat in seats),
        minimum_share=sum(minimum_shares) if minimum_shares else None,
        slo_s=_shortest(seat.slo_s for seat in seats),
        ttft_slo_s=_shortest(seat.ttft_slo_s for seat in seats),
        tpot_slo_s=_shortest(seat.tpot_slo_s for seat in seats),
    )


def _shortest(objectives_s: Iterable[float | None]) -> float | None:
    return min((objective_s for objective_s in objectives_s if objective_s is not None), default=None)
