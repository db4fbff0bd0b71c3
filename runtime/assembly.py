"""A team at work: its engines, the controller that resizes them, and the orchestrator that runs jobs on them."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from runtime.config import Config, Control, PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.controller import Controller
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.forecast import Forecast
from runtime.control.snapshotter import Snapshotter, Terms
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec
from runtime.events import EngineChanged, Event, Listener, ignore
from runtime.jobs.orchestrator import STREAM_INTERVAL, Orchestrator
from runtime.jobs.team import Team
from runtime.telemetry.reading import Reading
from runtime.telemetry.sampler import Sampler, best_source

Publish = Callable[[Record], None]
"""Called with the record of every decision of the controller."""


class RunningTeam:
    """A team whose engines are ready, with the controller and the orchestrator over them.

    `orchestrator` runs jobs of `team`. `controller` resizes the engines while it is entered. The engines may be real or
    modelled.
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
    ) -> None:
        self.engines = engines
        self.sharing = sharing
        self._price = control.price_per_gpu_hour
        self._listener = listener
        self._forecast = Forecast()
        self._policies = policies
        self.controller = Controller(
            engines,
            sharing,
            Snapshotter(engines, self._forecast, terms(team), reading),
            policies.policy,
            every_s=control.every_s,
            grace_s=control.grace_s,
            shadow=policies.shadow,
            log=log,
            publish=publish,
        )
        self.orchestrator = self.orchestrate(team)

    def orchestrate(self, team: Team, stream_interval: int = STREAM_INTERVAL) -> Orchestrator:
        """Return an orchestrator that runs jobs of a team on these engines.

        Its events go to the forecast, the controller and the listener. `stream_interval` is the number of tokens of a
        reply that an engine sends at once.
        """
        self._forecast.seat({seat.name: seat.engine for seat in team.seats.values()})
        return Orchestrator(team, self.engines, self._hear, self._price, stream_interval)

    def use_policy(self, choice: PolicyChoice) -> None:
        """Replace the policy that decides. Raises ConfigError or PluginError and keeps the old one if it is invalid."""
        self.controller.use(self._policies.contain(choice, "policy"))

    def generate(self, engine: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request that belongs to no job. The controller checks at once for a burst of them."""
        self.controller.look()
        return self.engines[engine].generate(request)

    def _hear(self, event: Event) -> None:
        self._forecast.hear(event)
        self.controller.hear(event)
        self._listener(event)


@asynccontextmanager
async def start_team(
    config: Config,
    team: Team,
    folder: Path,
    listener: Listener = ignore,
    publish: Publish = lambda record: None,
) -> AsyncIterator[RunningTeam]:
    """Start the engines that a team needs, telemetry and the controller; stop them on leaving.

    Logs go to `folder`, decisions to `decisions.jsonl` in it. Raises ConfigError or PluginError for a policy that
    cannot be made, before any engine starts, and EngineError if an engine does not start.
    """

    def on_state(engine: str, state: EngineState, seconds: float) -> None:
        listener(EngineChanged(engine, state, seconds))

    async with AsyncExitStack() as owned:
        policies = owned.enter_context(ContainedPolicies(config.control.policy, config.control.shadow))
        fleet = await owned.enter_async_context(
            Fleet(
                needed_engines(config, team),
                folder,
                on_state,
                config.device.memory_bytes,
                kv_cache_bytes=config.device.kv_cache_memory_bytes,
            )
        )
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
        )
        await owned.enter_async_context(running.controller)
        yield running


def needed_engines(config: Config, team: Team) -> dict[str, EngineSpec]:
    """Return the engines that the team's seats use; a workflow without critics starts no engine for them."""
    return {name: config.engines[name] for name in dict.fromkeys(seat.engine for seat in team.seats.values())}


def terms(team: Team) -> dict[str, Terms]:
    """What the seats of each engine declare: the most urgent priority, minimum shares together, the tightest SLO."""
    seats = defaultdict(list)
    for seat in team.seats.values():
        seats[seat.engine].append(seat)
    return {
        engine: Terms(
            priority=min(seat.priority for seat in members),
            minimum_share=sum(least) if (least := [m for s in members if (m := s.minimum_share) is not None]) else None,
            slo_s=min((s.slo_s for s in members if s.slo_s is not None), default=None),
        )
        for engine, members in seats.items()
    }
