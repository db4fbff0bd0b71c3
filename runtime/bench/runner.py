"""Runs policies side by side over the same engines: every repeat plays every load under every policy, in turns.

The order rotates from repeat to repeat, and within a repeat every policy gets the same jobs at the same times.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from runtime.assembly import RunningTeam
from runtime.bench.metrics import GIB, metrics
from runtime.bench.play import Played, Player
from runtime.bench.results import JobRow, Moment, Run
from runtime.bench.workload import Source
from runtime.config import PolicyChoice
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Counts
from runtime.control.decision_log import Record
from runtime.control.snapshot import EngineMoment
from runtime.errors import TroupeError
from runtime.events import Event
from runtime.jobs.orchestrator import Orchestrator

STREAM_INTERVAL = 1
"""Every token is streamed, so that times between tokens are those of `vllm bench serve`."""
SETTLE_S = 0.5
"""Between two runs: the engines take up what the next policy begins with."""
LIMIT = "limit"
"""The name under which memory for everyone runs."""


@dataclass(frozen=True)
class Rival:
    """A policy as it takes part: its name in the results, the policy, and a budget of its own (bytes)."""

    name: str
    choice: PolicyChoice
    budget_bytes: int | None = None


@dataclass
class Bench:
    """One benchmark over a running team whose controller is entered.

    `take_job` and `take_moment` are called with each row as it comes. `progress` is called when a run begins, with its
    name and the seconds for which jobs will arrive in it.
    """

    running_team: RunningTeam
    orchestrators: Mapping[str, Orchestrator]
    source: Source
    contain: Callable[[PolicyChoice], ContainedPolicy]
    budget_bytes: int
    take_job: Callable[[JobRow], None] = lambda row: None
    take_moment: Callable[[Moment], None] = lambda moment: None
    progress: Callable[[str], None] = lambda name: None
    _player: Player | None = None
    _now: tuple[str, float, int] | None = None
    _started_s: float = 0.0

    async def run(self, rivals: list[Rival], loads: Iterable[float], repeats: int, warm_up: bool = True) -> list[Run]:
        """All of it. The first play of all warms the engines up, and counts for nothing."""
        policies = {rival.name: self.contain(rival.choice) for rival in rivals}
        loads = list(loads)
        if warm_up:
            await self._one(rivals[0], policies[rivals[0].name], min(loads), -1, 0)
        runs = []
        for repeat in range(repeats):
            for load in loads:
                turn = repeat % len(rivals)
                for order, rival in enumerate(rivals[turn:] + rivals[:turn]):
                    runs.append(await self._one(rival, policies[rival.name], load, repeat, order))
        return sorted(runs, key=lambda run: (run.load, [r.name for r in rivals].index(run.policy), run.repeat))

    async def _one(self, rival: Rival, guard: ContainedPolicy, load: float, repeat: int, order: int) -> Run:
        self.progress(f"{rival.name}, load {load:g}, repeat {repeat + 1}" if repeat >= 0 else "warming up")
        controller, clock = self.running_team.controller, asyncio.get_running_loop().time
        controller.use(guard, rival.budget_bytes or self.budget_bytes)
        await asyncio.sleep(SETTLE_S)
        rows: list[JobRow] = []

        def take(played: Played) -> None:
            rows.append(_row(rival.name, load, repeat, played))
            if repeat >= 0:
                self.take_job(rows[-1])

        self._player = player = Player(self.orchestrators, f"{rival.name}/{load:g}/{repeat}", take)
        controller.counts = counts = Counts()
        preempted = self._preemptions()
        self._started_s, self._now = clock(), (rival.name, load, repeat) if repeat >= 0 else None
        seconds = await player.play(self.source.draw(load, repeat))
        self._player = self._now = None
        if rows and all(row.error for row in rows):
            raise TroupeError(f"under {rival.name} not one job was answered: {rows[0].error}")
        figures = metrics(
            rows,
            seconds,
            self.source.workload.limits,
            counts,
            self._preemptions() - preempted,
        )
        return Run(rival.name, load, repeat, order, figures)

    def hear(self, event: Event) -> None:
        """A listener of the orchestrators."""
        if self._player is not None:
            self._player.hear(event)

    def publish(self, record: Record) -> None:
        """Where the controller's records go."""
        if self._now is not None:
            self.take_moment(replace(moment(record, *self._now), at_s=record.snapshot.now_s - self._started_s))

    def _preemptions(self) -> int:
        return sum(engine.stats().preemptions for engine in self.running_team.engines.values())


def moment(record: Record, policy: str, load: float, repeat: int) -> Moment:
    """A line of `decisions.jsonl`, on the controller's own clock."""
    return Moment(
        policy=policy,
        load=load,
        repeat=repeat,
        at_s=record.snapshot.now_s,
        cause=record.cause,
        engines={name: EngineMoment.of(view) for name, view in record.snapshot.engines.items()},
        reasons=record.decision.reasons if record.decision else {"": record.fault or ""},
        moved_bytes=record.moved_bytes,
        seconds=record.seconds,
        utilization=record.snapshot.device.utilization,
    )


def _row(policy: str, load: float, repeat: int, played: Played) -> JobRow:
    result = played.result
    costs = [used.cost for used in result.usage.values() if used.cost is not None]
    return JobRow(
        policy=policy,
        load=load,
        repeat=repeat,
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
