"""Run policies side by side on the same engines: each repeat plays every load under every policy in turn.

Within a repeat, every policy gets the same jobs at the same times. The order of the policies rotates from repeat to
repeat.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from runtime.assembly import RunningTeam
from runtime.bench.metrics import GIB, ResidencyFigures, metrics
from runtime.bench.play import Played, Player
from runtime.bench.results import JobRow, Moment, Run
from runtime.bench.workload import Source
from runtime.config import PolicyChoice, ResidencyChoice
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Counts
from runtime.control.decision_log import Record
from runtime.control.snapshot import EngineMoment
from runtime.errors import TroupeError
from runtime.events import Event
from runtime.jobs.orchestrator import Orchestrator
from runtime.residency import catalogue

STREAM_INTERVAL = 1
"""Tokens in one message of an engine. With 1, times between tokens mean the same as in `vllm bench serve`."""
SETTLE_S = 0.5
"""Pause before each run, in which the engines take up the first grants of the next policy."""
WARM_UP = -1
"""The repeat whose results are discarded."""
LIMIT = "limit"
"""Name of the run that has memory for all engines. It shows what is possible."""


@dataclass(frozen=True)
class Rival:
    """A policy that takes part: its name in the results, the policy, and its own budget if it has one (bytes).

    `residency` is the residency policy beside it. None keeps the one of the configuration.
    """

    name: str
    choice: PolicyChoice
    budget_bytes: int | None = None
    residency: ResidencyChoice | None = None


class _Turn(NamedTuple):
    """One policy's play of the workload."""

    policy: str
    load: float
    repeat: int

    @property
    def recorded(self) -> bool:
        return self.repeat != WARM_UP

    def __str__(self) -> str:
        return f"{self.policy}, load {self.load:g}, repeat {self.repeat + 1}" if self.recorded else "warming up"


class Recorder:
    """The listener of a benchmark. It is made before the team starts, and passes on what belongs to the current play.

    `on_event` must listen to the orchestrators' events, and `publish` must get the controller's records. `on_moment` is
    called for each record of a play that counts.
    """

    def __init__(self, on_moment: Callable[[Moment], None]) -> None:
        self._on_moment = on_moment
        self._player: Player | None = None
        self._turn: _Turn | None = None
        self._started_s = 0.0
        self._engines: dict[str, Mapping[str, EngineMoment]] = {}

    @contextmanager
    def recording(self, player: Player, turn: _Turn) -> Iterator[None]:
        """Pass events to a player, and records to `on_moment` unless the turn is the warm-up."""
        self._player, self._turn = player, turn if turn.recorded else None
        self._started_s = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._player = self._turn = None

    def on_event(self, event: Event) -> None:
        """Pass an event of the orchestrators to the current player."""
        if self._player is not None:
            self._player.on_event(event)

    def publish(self, record: Record) -> None:
        """Pass a record of a controller on, with the engines of all devices and its time from the play's start."""
        if self._turn is not None:
            views = record.snapshot.engines.items()
            self._engines[record.device] = {name: EngineMoment.of(view) for name, view in views}
            engines = {name: moment for each in self._engines.values() for name, moment in each.items()}
            self._on_moment(_moment(record, engines, self._turn, record.snapshot.now_s - self._started_s))


@dataclass(frozen=True)
class Bench:
    """A benchmark over a running team, whose controller must have been entered.

    - `recorder`: the listener of the team's events and of the controller's records
    - `orchestrators`: the orchestrator of each phase of the workload
    - `contain`: makes the contained form of a policy
    - `budgets_bytes`: the memory of each device that policies divide, unless a rival has its own budget
    - `on_job`: called with each job that ended; not called during the warm-up
    - `on_run`: called with the name of each run before it starts
    """

    running_team: RunningTeam
    recorder: Recorder
    orchestrators: Mapping[str, Orchestrator]
    source: Source
    contain: Callable[[PolicyChoice], ContainedPolicy]
    budgets_bytes: Mapping[str, int]
    on_job: Callable[[JobRow], None]
    on_run: Callable[[str], None]

    async def run(self, rivals: list[Rival], loads: Iterable[float], repeats: int, warm_up: bool = True) -> list[Run]:
        """Run everything, and return the runs sorted by load, policy and repeat.

        The warm-up is a play of the lowest load under the first policy. Its results are discarded.
        """
        policies = {
            rival.name: {device: self.contain(rival.choice) for device in self.running_team.devices} for rival in rivals
        }
        loads = list(loads)
        if warm_up:
            await self._play(rivals[0], policies[rivals[0].name], _Turn(rivals[0].name, min(loads), WARM_UP))
        runs = []
        for repeat in range(repeats):
            for load in loads:
                first = repeat % len(rivals)
                for order, rival in enumerate(rivals[first:] + rivals[:first]):
                    turn = _Turn(rival.name, load, repeat)
                    figures = await self._play(rival, policies[rival.name], turn)
                    runs.append(Run(rival.name, load, repeat, order, figures))
        return sorted(runs, key=lambda run: (run.load, [r.name for r in rivals].index(run.policy), run.repeat))

    async def _play(self, rival: Rival, policies: Mapping[str, ContainedPolicy], turn: _Turn) -> Mapping[str, float]:
        """Play the workload once under a policy, and return the metrics.

        Raises TroupeError if every job fails.
        """
        self.on_run(str(turn))
        devices = self.running_team.devices
        for name, device in devices.items():
            device.controller.use(policies[name], rival.budget_bytes or self.budgets_bytes[name])
        if rival.residency:
            residency_policy = catalogue.make(rival.residency.name, rival.residency.options)
            await asyncio.gather(*(device.keeper.begin(residency_policy) for device in devices.values()))
        await asyncio.sleep(SETTLE_S)
        rows: list[JobRow] = []

        def take(played: Played) -> None:
            rows.append(_row(turn, played))
            if turn.recorded:
                self.on_job(rows[-1])

        player = Player(self.orchestrators, f"{turn.policy}/{turn.load:g}/{turn.repeat}", take)
        for device in devices.values():
            device.controller.counts = Counts()
        preemptions, residency = self._preemptions(), self._residency()
        with self.recorder.recording(player, turn):
            seconds = await player.play(self.source.draw(turn.load, turn.repeat))
        if rows and all(row.error for row in rows):
            raise TroupeError(f"under the policy {turn.policy} every job failed; the first error is: {rows[0].error}")
        preempted = self._preemptions() - preemptions
        figures = self._residency().since(residency) if rival.residency else None
        counts = self.running_team.controllers.counts
        return metrics(rows, seconds, self.source.workload.slo, counts, preempted, figures)

    def _preemptions(self) -> int:
        return sum(engine.stats().preemptions for engine in self.running_team.engines.values())

    def _residency(self) -> ResidencyFigures:
        engines, counts = self.running_team.engines.values(), self.running_team.residency_counts
        return ResidencyFigures(
            sum(engine.stats().held for engine in engines),
            counts.idle_byte_seconds,
            counts.wakes,
            counts.ahead,
            counts.wasted,
        )


def _moment(record: Record, engines: Mapping[str, EngineMoment], turn: _Turn, at_s: float) -> Moment:
    return Moment(
        policy=turn.policy,
        load=turn.load,
        repeat=turn.repeat,
        at_s=at_s,
        cause=record.cause,
        engines=engines,
        reasons=record.decision.reasons if record.decision else {"": record.fault or ""},
        moved_bytes=record.moved_bytes,
        seconds=record.seconds,
        utilization=record.snapshot.device.utilization,
    )


def _row(turn: _Turn, played: Played) -> JobRow:
    result = played.result
    costs = [used.cost for used in result.usage.values() if used.cost is not None]
    return JobRow(
        policy=turn.policy,
        load=turn.load,
        repeat=turn.repeat,
        phase=played.phase,
        id=result.id.rpartition("/")[2],
        arrived_s=played.arrived_s,
        jct_s=played.ended_s - played.arrived_s,
        correct=result.correct,
        error=result.error,
        gib_seconds=sum(used.byte_seconds for used in result.usage.values()) / GIB,
        engine_seconds=sum(used.engine_seconds for used in result.usage.values()),
        cost=sum(costs) if costs else None,
        calls=played.calls,
    )
