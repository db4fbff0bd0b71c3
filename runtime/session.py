"""A configuration at work: its engines, the controller that moves memory between them, and the orchestrator over
both."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

from runtime.config import Config, Control, PolicyChoice
from runtime.control import catalogue
from runtime.control.controller import Controller
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.forecast import Forecast
from runtime.control.guard import Guard
from runtime.control.observer import Observer, Terms
from runtime.daemon import DaemonExecutor
from runtime.engines.base import Chunk, EngineHandle, EngineSpec, GenerateRequest
from runtime.engines.fleet import Fleet
from runtime.engines.sharing import Sharing
from runtime.events import Event, Listener, ignore
from runtime.jobs.orchestrator import STREAM_INTERVAL, Orchestrator
from runtime.jobs.team import Team
from runtime.telemetry.reading import Reading
from runtime.telemetry.sampler import Sampler, best_source

Publish = Callable[[Record], None]


class Session:
    """An async context manager over everything that a team works with; `crew.orchestrator` runs jobs while it is
    entered.

    Engines that no seat of the team needs are not started. Decisions are logged to `decisions.jsonl` in the folder.
    """

    fleet: Fleet
    crew: "Crew"

    def __init__(
        self,
        config: Config,
        team: Team,
        folder: Path,
        listener: Listener = ignore,
        publish: Publish = lambda record: None,
    ) -> None:
        self._config = config
        self._team = team
        self._folder = folder
        self._listener = listener
        self._publish = publish
        self._owned = AsyncExitStack()

    async def __aenter__(self) -> Self:
        config, team = self._config, self._team
        guards = Guards(config.control)  # before any engine starts: an unknown policy is told at once
        async with AsyncExitStack() as owned:
            self.fleet = await owned.enter_async_context(
                Fleet(
                    served(config, team),
                    self._folder,
                    self._listener,
                    config.device.memory_bytes,
                    kv_cache_bytes=config.device.kv_cache_memory_bytes,
                )
            )
            on_gpu = any(engine.limits.device_uuid for engine in self.fleet.engines.values())
            sampler = await owned.enter_async_context(Sampler(best_source(on_gpu)))
            log = owned.enter_context(DecisionLog(self._folder / "decisions.jsonl"))
            owned.callback(guards.close)
            self.crew = Crew(
                team,
                self.fleet.engines,
                self.fleet.sharing,
                config.control,
                guards,
                listener=self._listener,
                publish=self._publish,
                reading=lambda: sampler.latest,
                log=log,
            )
            await owned.enter_async_context(self.crew.controller)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()


@asynccontextmanager
async def open_crew(
    config: Config, team: Team, folder: Path, listener: Listener, publish: Publish
) -> AsyncIterator["Crew"]:
    """The crew of a session, for as long as that is entered."""
    async with Session(config, team, folder, listener, publish) as session:
        yield session.crew


class Guards:
    """The policies of a configuration under guard, a third party's in a thread of its own; `threads` False for none.

    A shipped one decides sooner than a thread is awake: its calls are made on the event loop.
    """

    def __init__(self, control: Control, threads: bool = True) -> None:
        self._threads = threads
        self._executors: list[DaemonExecutor] = []
        self.policy = self.guard(control.policy)
        self.shadow = self.guard(control.shadow, "control.shadow") if control.shadow else None

    def guard(self, choice: PolicyChoice, place: str = "control.policy") -> Guard:
        """A policy by its choice. Raises ConfigError, PluginError."""
        policy = catalogue.make(choice.name, choice.options, place)
        if not self._threads or catalogue.is_shipped(policy):
            return Guard(choice.name, policy)
        executor = DaemonExecutor(f"policy {choice.name}")
        self._executors.append(executor)
        return Guard(choice.name, policy, executor)

    def close(self) -> None:
        """End the threads; one that a policy never leaves is not waited for."""
        for executor in self._executors:
            executor.shutdown()


def served(config: Config, team: Team) -> dict[str, EngineSpec]:
    """The engines that the team needs; a workflow without critics starts none for them."""
    return {name: config.engines[name] for name in dict.fromkeys(seat.engine for seat in team.seats.values())}


class Crew:
    """The controller and the orchestrators over engines that are up, real or not. Nothing runs before the controller is
    entered."""

    def __init__(
        self,
        team: Team,
        engines: Mapping[str, EngineHandle],
        sharing: Sharing,
        control: Control,
        guards: Guards,
        *,
        listener: Listener = ignore,
        publish: Publish = lambda record: None,
        reading: Callable[[], Reading] | None = None,
        log: DecisionLog | None = None,
    ) -> None:
        self.engines = engines
        self._price = control.price_per_gpu_hour
        self._listener = listener
        self._forecast = Forecast()
        self._guards = guards
        self.controller = Controller(
            engines,
            sharing,
            Observer(engines, self._forecast, terms(team), reading),
            guards.policy,
            every_s=control.every_s,
            grace_s=control.grace_s,
            shadow=guards.shadow,
            log=log,
            publish=publish,
        )
        self.orchestrator = self.orchestrate(team)

    def orchestrate(self, team: Team, stream_interval: int = STREAM_INTERVAL) -> Orchestrator:
        """Return what runs jobs of a team over these engines; their events go to forecast, controller and listener.

        `stream_interval` is how many tokens of a reply come together.
        """
        self._forecast.seat({seat.name: seat.engine for seat in team.seats.values()})
        return Orchestrator(team, self.engines, self._hear, self._price, stream_interval)

    def use_policy(self, choice: PolicyChoice) -> None:
        """Let another policy decide from now on. Raises ConfigError, PluginError, and then nothing has changed."""
        self.controller.use(self._guards.guard(choice, "policy"))

    def generate(self, engine: str, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One request to an engine, beside the jobs; a burst of them is decided about at once, too."""
        self.controller.look()
        return self.engines[engine].generate(request)

    def _hear(self, event: Event) -> None:
        self._forecast.hear(event)
        self.controller.hear(event)
        self._listener(event)


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
