"""Puts a running team together: its engines, the controller that resizes them, and the orchestrator that runs jobs."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

from runtime.cluster.agent import Agent, MakeAgent
from runtime.cluster.connection import connected
from runtime.cluster.remote_device import RemoteDevice
from runtime.config import Config, Control
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.decision_log import DecisionLog
from runtime.control.forecast import Forecast
from runtime.control.snapshotter import EngineRequirements
from runtime.devices.controllers import Controllers
from runtime.devices.expected_calls import ExpectedCalls
from runtime.devices.handle import DeviceHandle, Policies, Publish, Startable, Terms
from runtime.devices.rebalancer import Rebalancer
from runtime.devices.routing import Router
from runtime.devices.start import sampled, start_fleets
from runtime.engines import replicas
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.replicas import engine_of
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.spec import EngineSpec, ReplicaRange
from runtime.engines.step_time import StepTime
from runtime.errors import ConfigError, PluginError
from runtime.events import CallPaused, EngineChanged, Event, JobAdvanced, Listener, NodesAwaited, ignore
from runtime.jobs.orchestrator import STREAM_INTERVAL, Orchestrator
from runtime.jobs.team import Seat, Team
from runtime.residency import catalogue as residency_catalogue
from runtime.residency.call_times import CallTimes
from runtime.residency.keeper import Counts
from runtime.residency.policy import ResidencyPolicy
from runtime.tools import catalogue as tool_catalogue
from runtime.tools.tool import ToolSource
from runtime.tools.toolbox import Toolbox


class RunningTeam:
    """A team whose engines have started, on one or several devices, with all that controls them.

    The engines may be real or modelled. While the team's context is entered, each of `devices` is controlled, and
    `rebalancer` adds and removes replicas of the engines in `replica_bounds`, which has the fewest and the most of
    each. It writes its changes to the file `placements`. `add_device` can be used if `more_devices_come`.
    `orchestrator` runs jobs of `team`. `engines` are those of all devices, by the name of the replica.
    """

    def __init__(
        self,
        team: Team,
        started: Mapping[str, Startable],
        control: Control,
        policies: ContainedPolicies,
        *,
        listener: Listener = ignore,
        publish: Publish = lambda record: None,
        log: DecisionLog | None = None,
        residency: ResidencyPolicy | None = None,
        may_sleep: Collection[str] = (),
        toolbox: Toolbox | None = None,
        replica_bounds: Mapping[str, tuple[int, int]] | None = None,
        placements: Path | None = None,
        more_devices_come: bool = False,
    ) -> None:
        self.team = team
        self.toolbox = toolbox or Toolbox()
        self.engines = {name: engine for each in started.values() for name, engine in each.engines.items()}
        self._replicas = replicas.gathered(self.engines, restored=more_devices_come)
        self._policies = policies
        self._residency = residency or residency_catalogue.make("keep")
        self._may_sleep = may_sleep
        self._control = control
        self._publish, self._log = publish, log
        self._price = control.price_per_gpu_hour
        self._listener = listener
        self._forecast = Forecast()
        self._call_times = CallTimes()
        self.devices: dict[str, DeviceHandle] = {}
        for name, engines in started.items():
            self.devices[name] = engines.device(
                name, self._terms(engines.engines, len(started) == 1 and not more_devices_come)
            )
        for each in self._replicas.values():
            each.choose = Router(self.devices)
        self.rebalancer = Rebalancer(self.devices, replica_bounds or {}, placements)
        self.controllers = Controllers(self.devices, policies)
        self._rebalances = bool(replica_bounds)
        self.orchestrator = self.orchestrate(team)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as owned:
            for device in self.devices.values():
                await owned.enter_async_context(device)
            if self._rebalances:
                await owned.enter_async_context(self.rebalancer)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()

    def _terms(self, engines: Mapping[str, EngineHandle], alone: bool) -> Terms:
        """Return the terms on which a device with these engines is controlled. `alone`, it is the only one."""
        shares, shadow = self._policies.make() if self.devices else (self._policies.policy, self._policies.shadow)
        expected = ExpectedCalls(engines, self._replicas, self._forecast, self._call_times)
        requirements = engine_requirements(self.team)
        return Terms(
            self._forecast if alone else expected,
            self._call_times if alone else expected,
            {each: requirements[engine_of(each)] for each in engines if engine_of(each) in requirements},
            [each for each in engines if engine_of(each) in self._may_sleep],
            self._control,
            Policies(shares, shadow, self._residency),
            self._publish,
            self._log,
        )

    async def add_device(self, name: str, engines: Startable) -> None:
        """Use and control another device, whose engines have started."""
        self.engines.update(engines.engines)
        for replica, engine in engines.engines.items():
            self._replicas[engine_of(replica)].add(engine)
        device = engines.device(name, self._terms(engines.engines, alone=False))
        self.devices[name] = await self._owned.enter_async_context(device)
        self.controllers.match(name)

    def orchestrate(self, team: Team, stream_interval: int = STREAM_INTERVAL) -> Orchestrator:
        """Return an orchestrator that runs jobs of a team on these engines.

        Its events go to the forecast, the controllers and the listener. `stream_interval` is the number of tokens that
        an engine sends at once.
        """
        engine_of_seat = {seat.name: seat.engine for seat in team.seats.values()}
        self._forecast.seat(engine_of_seat)
        self._call_times.seat(engine_of_seat)
        return Orchestrator(team, self._replicas, self._on_event, self._price, stream_interval, self.toolbox)

    def generate(self, engine: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request that belongs to no job. An engine that sleeps wakes for it.

        The controllers check for a burst at once.
        """
        for device in self.devices.values():
            device.controller.look()
            device.keeper.look()
        return self._replicas[engine].generate(request)

    @property
    def residency_policy(self) -> str:
        """The name of the residency policy that decides."""
        return next(iter(self.devices.values())).keeper.policy

    @property
    def residency_counts(self) -> Counts:
        """The counts of the keepers of all devices."""
        total = Counts()
        for device in self.devices.values():
            total.include(device.keeper.counts)
        return total

    def expect_job(self) -> float:
        """Return how long a job that began now would wait for its first engine to wake, and expect one for a while."""
        devices = [device for device in self.devices.values() if not device.lost]
        if not devices:
            return 0.0
        soonest = min(devices, key=lambda device: device.keeper.wait_of_job_s())
        return soonest.keeper.expect_job()

    def _on_event(self, event: Event) -> None:
        self._forecast.on_event(event)
        self._call_times.on_event(event)
        for device in self.devices.values():
            device.controller.on_event(event)
            if isinstance(event, JobAdvanced | CallPaused):
                device.keeper.look()
        self._listener(event)


@asynccontextmanager
async def start_team(
    config: Config,
    team: Team,
    folder: Path,
    listener: Listener = ignore,
    publish: Publish = lambda record: None,
    step_times: Mapping[str, StepTime] | None = None,
    make_agent: MakeAgent = Agent,
) -> AsyncIterator[RunningTeam]:
    """Start a team's engines, telemetry and controller; stop them when the context is left.

    The engines log to `folder`, and the controller writes its decisions to `decisions.jsonl` in it. Engines in
    `step_times` take turns on an emulated device, for their step time. `make_agent` makes the agents of a cluster.
    Raises ConfigError or PluginError if a policy or a tool cannot be used, before any engine starts, and EngineError if
    an engine does not start.
    """

    def on_state(engine: str, state: EngineState, seconds: float) -> None:
        listener(EngineChanged(engine, state, seconds))

    def on_wait(present: int, wanted: int) -> None:
        listener(NodesAwaited(present, wanted))

    async with AsyncExitStack() as owned:
        policies = owned.enter_context(ContainedPolicies(config.control.policy, config.control.shadow))
        residency = residency_catalogue.make(config.residency.policy.name, config.residency.policy.options)
        toolbox = await owned.enter_async_context(Toolbox(needed_tools(config, team)))
        specs = needed_engines(config, team)
        may_sleep = [name for name in specs if config.may_sleep(name)]
        started: Mapping[str, Startable]
        cluster = None
        if config.cluster is not None:
            if step_times:
                raise ConfigError(f"{config.source}: cluster: a device cannot be emulated on it; leave out --emulate")
            requirements = engine_requirements(team)
            connection = connected(config, specs, may_sleep, requirements, folder, on_state, on_wait, make_agent)
            cluster = await owned.enter_async_context(connection)
            started = cluster.devices
        else:
            fleets = await start_fleets(owned, config, specs, may_sleep, folder, on_state, step_times or {})
            started = await sampled(owned, fleets)
        log = owned.enter_context(DecisionLog(folder / "decisions.jsonl"))
        running = RunningTeam(
            team,
            started,
            config.control,
            policies,
            listener=listener,
            publish=publish,
            log=log,
            residency=residency,
            may_sleep=may_sleep,
            toolbox=toolbox,
            replica_bounds=_replica_bounds(specs, len(started), cluster is not None),
            placements=folder / "placements.jsonl",
            more_devices_come=cluster is not None,
        )
        await owned.enter_async_context(running)
        if cluster is not None:

            async def add(device: RemoteDevice) -> None:
                await running.add_device(device.name, device)
                running.rebalancer.bounds.update(_replica_bounds(specs, len(running.devices), on_cluster=True))

            cluster.on_device = add
        yield running


def _replica_bounds(
    specs: Mapping[str, EngineSpec], devices: int, on_cluster: bool = False
) -> dict[str, tuple[int, int]]:
    """Return the fewest and the most replicas of each engine whose number may change.

    On a cluster these are all engines: when a node is lost, other nodes get its replicas.
    """
    if on_cluster:
        return {name: spec.replica_bounds(devices) for name, spec in specs.items()}
    ranges = {name: spec for name, spec in specs.items() if isinstance(spec.replicas, ReplicaRange)}
    return {name: spec.replica_bounds(devices) for name, spec in ranges.items()} if devices > 1 else {}


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
        jct_slo_s=_shortest(seat.jct_slo_s for seat in seats),
        slo_s=_shortest(seat.slo_s for seat in seats),
        ttft_slo_s=_shortest(seat.ttft_slo_s for seat in seats),
        tpot_slo_s=_shortest(seat.tpot_slo_s for seat in seats),
    )


def _shortest(objectives_s: Iterable[float | None]) -> float | None:
    return min((objective_s for objective_s in objectives_s if objective_s is not None), default=None)
