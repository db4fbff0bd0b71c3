"""Keeps the right engines on the device: looks at them, asks the residency policy, and carries its moves out."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

from runtime.control.forecast import ExpectedRequests
from runtime.engines.handle import SLEEPING, EngineHandle, EngineState, EngineStats
from runtime.engines.sharing import Sharing
from runtime.errors import EngineError
from runtime.residency.call_times import ExpectedTimes
from runtime.residency.idle_times import IdleTimes
from runtime.residency.policies.lru import Lru
from runtime.residency.policy import HELD_S, ResidencyDecision, ResidencyPolicy
from runtime.residency.snapshot import STAYS, Residence, ResidencySnapshot

EVERY_S = 0.1
STARVED_S = 3 * HELD_S
"""A policy that lets a request be held for longer than this is overruled."""
MIN_PAUSE_S = 0.01
"""Shortest pause between two decisions."""
SHORT_S = 1.0
"""An engine sleeps for a budget that is too small only after this many seconds."""
EXPECTED_S = 5.0
"""Seconds for which the keeper expects a job that was refused because no engine could wake in time for it."""


@dataclass(frozen=True)
class Rules:
    """The rules for an engine's residency, from the configuration; see Residence for each field."""

    may_sleep: bool = True
    priority: int = 1


@dataclass
class Counts:
    """Counts since the keeper was created.

    - `wakes`, `sleeps`: moves that were carried out; `refused`: decisions that were not.
    - `ahead`: wakes that began before the request that needed them; `wasted`: wakes of engines that slept again without
      a request.
    - `idle_byte_seconds`: the memory that awake engines without calls need at least, times seconds.
    """

    wakes: int = 0
    sleeps: int = 0
    refused: int = 0
    ahead: int = 0
    wasted: int = 0
    idle_byte_seconds: float = 0.0

    def include(self, other: "Counts") -> None:
        """Add the counts of another keeper."""
        self.wakes += other.wakes
        self.sleeps += other.sleeps
        self.refused += other.refused
        self.ahead += other.ahead
        self.wasted += other.wasted
        self.idle_byte_seconds += other.idle_byte_seconds


@dataclass
class _History:
    """The record of one engine between two looks. Times are on the event loop's clock."""

    called_s: float
    awake_since_s: float
    arrived: int = 0
    served_before: int = -1
    had_calls: bool = False
    held_since_s: float | None = None
    expected_until_s: float = 0.0
    idle_times: IdleTimes = field(default_factory=IdleTimes)


class Keeper:
    """The owner of the residency of one device's engines.

    An async context manager: it decides every 100 ms while it is entered, and at once after `look`. `on_change` is
    called when an engine needs memory and after each move.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        sharing: Sharing,
        forecast: ExpectedRequests,
        call_times: ExpectedTimes,
        policy: ResidencyPolicy,
        rules: Mapping[str, Rules] | None = None,
        on_change: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self.counts = Counts()
        self.snapshot: ResidencySnapshot | None = None
        self._engines = engines
        self._sharing = sharing
        self._forecast = forecast
        self._call_times = call_times
        self._policy = policy
        self._rules = rules or {}
        self._on_change = on_change
        self._history: dict[str, _History] = {}
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._resting = False
        self._short_since_s: float | None = None
        self._look_now = asyncio.Event()
        self._logged: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="keeper")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        tasks = [self._task, *self._moving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def look(self) -> None:
        """Decide now instead of at the next tick."""
        self._look_now.set()

    @property
    def policy(self) -> str:
        """The name of the policy that decides."""
        return self._policy.name

    def expect_job(self) -> float:
        """Return how long a job that began now would wait for its first engine to wake, and expect one for a while.

        Until jobs have shown with which engine they begin, the engine that serves first counts.
        """
        wait_s = self._waits_of_job_s()
        if not wait_s:
            return 0.0
        soonest = min(wait_s, key=lambda name: wait_s[name])
        if wait_s[soonest]:
            now_s = asyncio.get_running_loop().time()
            self._history_of(soonest).expected_until_s = now_s + wait_s[soonest] + EXPECTED_S
            self.look()
        return wait_s[soonest]

    def wait_of_job_s(self) -> float:
        """Return how long a job that began now would wait for an engine here; infinity if jobs begin with others."""
        return min(self._waits_of_job_s().values(), default=math.inf)

    def _waits_of_job_s(self) -> dict[str, float]:
        """Return how long each engine takes until it serves, of those with which jobs begin."""
        lead_s = self._call_times.lead_s()
        return {
            name: self._wait_s(engine.stats())
            for name, engine in self._engines.items()
            if engine.state is not EngineState.ABSENT and (not lead_s or lead_s.get(name) == 0)
        }

    def _wait_s(self, stats: EngineStats) -> float:
        """Return how long an engine takes until it serves; 0 if it does, or if it does not wait for a wake."""
        return stats.wake_s if stats.state in (*SLEEPING, EngineState.WAKING) else 0.0

    def use(self, policy: ResidencyPolicy) -> None:
        """Let another policy decide from now on."""
        self._policy = policy
        self.look()

    async def begin(self, policy: ResidencyPolicy) -> None:
        """Let another policy decide from now on, over engines that all sleep unless they may not.

        No engine may have requests. Returns when the policy has nothing left to move.
        """
        self._resting = True
        while self._moving:
            await asyncio.wait(self._moving.values())
        for name, engine in self._engines.items():
            may_sleep = self._rules.get(name, Rules()).may_sleep
            if may_sleep and engine.state is EngineState.READY:
                await self._sleep(name)
        self._resting = False
        self.use(policy)
        while True:
            await asyncio.sleep(2 * EVERY_S)
            if not self._moving:
                return
            await asyncio.wait(self._moving.values())

    async def _run(self) -> None:
        while True:
            self._look_now.clear()
            if not self._resting:
                try:
                    self.tick()
                except Exception:
                    logging.getLogger(__name__).exception("the keeper cannot look at the engines")
                    await asyncio.sleep(EVERY_S)
            await asyncio.sleep(MIN_PAUSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._look_now.wait()

    def tick(self) -> None:
        """Look at the engines, decide, and begin the moves."""
        before, self.snapshot = self.snapshot, self._take(asyncio.get_running_loop().time())
        snapshot = self.snapshot
        if before is not None:
            idle_bytes = sum(
                engine.awake_bytes * self._engines[engine.name].usage.gpus
                for engine in before.residences
                if engine.awake and not engine.calls
            )
            self.counts.idle_byte_seconds += idle_bytes * (snapshot.now_s - before.now_s)
        decision = self._decide(snapshot)
        for name in decision.sleep:
            self._move(name, self._sleep(name))
        for name in decision.wake:
            self._move(name, self._wake(name, ahead=not snapshot.engines[name].calls))
        for engine in snapshot.residences:
            gone = engine.state is EngineState.COLD and engine.name not in decision.wake
            if gone and self._sharing.ledger.held[engine.name]:
                self._move(engine.name, self._sharing.release(engine.name, 0))

    def _decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        """Return the policy's decision, or that of `lru` if it has a fault or lets requests wait for too long."""
        try:
            decision = self._policy.decide(snapshot)
            fault = _fault(snapshot, decision)
        except Exception as error:  # noqa: BLE001  a third-party policy may raise anything
            fault = f"it raised {error!r}"
        self.counts.refused += fault is not None
        if fault is not None and fault != self._logged:  # log a fault that repeats only once
            logging.getLogger(__name__).warning("a decision of the residency policy is refused: %s", fault)
        self._logged = fault
        return Lru(Lru.Options()).decide(snapshot) if fault else decision

    def _take(self, now_s: float) -> ResidencySnapshot:
        """Look at all engines."""
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        absent = [name for name, each in stats.items() if each.state is not EngineState.READY]
        due, next_call_s, lead_s = (
            self._forecast.open_calls(),
            self._call_times.next_call_s(absent),
            self._call_times.lead_s(),
        )
        residences = {}
        for name, engine in self._engines.items():
            if stats[name].state is EngineState.ABSENT:
                continue
            calls = max(engine.usage.in_flight, due.get(name, 0))
            state = EngineState.DRAINING if self._is_leaving(name, stats[name].state) else stats[name].state
            state = EngineState.WAKING if name in self._moving and state in SLEEPING else state
            history = self._note(name, calls, now_s, held=bool(calls) and state is not EngineState.READY)
            calls = calls or int(now_s < history.expected_until_s)
            limits, rules = engine.limits, self._rules.get(name, Rules())
            residences[name] = Residence(
                name=name,
                state=state,
                awake_bytes=limits.smallest_bytes,
                asleep_bytes=engine.asleep_bytes,
                calls=calls,
                held_s=0.0 if history.held_since_s is None else now_s - history.held_since_s,
                idle_s=0.0 if calls else now_s - history.called_s,
                awake_s=now_s - history.awake_since_s if state is EngineState.READY else 0.0,
                next_call_s=0.0 if calls else next_call_s.get(name, math.inf),
                lead_s=lead_s.get(name, 0.0),
                sleep_s=stats[name].sleep_s,
                wake_s=stats[name].wake_s,
                may_sleep=rules.may_sleep,
                priority=rules.priority,
                idle_times=history.idle_times,
            )
        snapshot = ResidencySnapshot(now_s, self._sharing.ledger.budget_bytes, residences)
        if snapshot.free_bytes >= 0:
            self._short_since_s = None
        elif self._short_since_s is None:
            self._short_since_s = now_s
        # A reading of the device may still count an engine that has just gone to sleep.
        if self._short_since_s is not None and now_s - self._short_since_s < SHORT_S:
            return replace(snapshot, budget_bytes=snapshot.budget_bytes - snapshot.free_bytes)
        return snapshot

    def _is_leaving(self, name: str, state: EngineState) -> bool:
        return state is EngineState.READY and name in self._moving

    def _note(self, name: str, calls: int, now_s: float, held: bool) -> _History:
        """Update what is remembered of an engine. `held` is True if it has calls and does not serve them."""
        history = self._history_of(name)
        arrived = self._engines[name].usage.arrived
        if calls or arrived != history.arrived:
            if not history.had_calls and history.arrived:
                history.idle_times.add(now_s - history.called_s)
            history.called_s, history.arrived = now_s, arrived
        if not held:
            history.held_since_s = None
        elif history.held_since_s is None:
            history.held_since_s = now_s
        history.had_calls = bool(calls)
        return history

    def _move(self, name: str, move: Coroutine[None, None, None]) -> None:
        task = self._moving[name] = asyncio.create_task(move, name=f"move {name}")
        task.add_done_callback(lambda done: self._moved(name))

    def _moved(self, name: str) -> None:
        del self._moving[name]
        self.look()
        self._on_change(f"engine {name} has moved")

    async def _sleep(self, name: str) -> None:
        engine, history = self._engines[name], self._history_of(name)
        try:
            await engine.sleep()
        except EngineError as error:
            logging.getLogger(__name__).warning("engine %s does not go to sleep: %s", name, error)
            history.awake_since_s = asyncio.get_running_loop().time()  # it stays for a while
            return
        await self._sharing.release(name, engine.held_bytes)
        self.counts.sleeps += 1
        self.counts.wasted += engine.usage.finished == history.served_before

    async def _wake(self, name: str, ahead: bool) -> None:
        engine, history = self._engines[name], self._history_of(name)
        limits = engine.limits
        history.served_before = engine.usage.finished
        if self._sharing.ledger.free < limits.smallest_bytes - self._sharing.ledger.held[name]:
            self._on_change(f"engine {name} wakes")  # the others shrink
        try:
            await self._sharing.wake(name)
        except EngineError as error:
            logging.getLogger(__name__).error("engine %s does not wake: %s", name, error)
            return
        history.awake_since_s = asyncio.get_running_loop().time()
        self.counts.wakes += 1
        self.counts.ahead += ahead

    def _history_of(self, name: str) -> _History:
        now_s = asyncio.get_running_loop().time()
        return self._history.setdefault(name, _History(now_s, now_s))


def _fault(snapshot: ResidencySnapshot, decision: ResidencyDecision) -> str | None:
    """Return why a decision cannot be carried out, or None."""
    free_bytes = snapshot.free_bytes
    moved = (*decision.sleep, *decision.wake)
    if len(set(moved)) < len(moved):
        return "it names an engine twice"
    for name in moved:
        if name not in snapshot.engines:
            return f"there is no engine {name!r}; the engines are {', '.join(snapshot.engines)}"
    for name in decision.sleep:
        engine = snapshot.engines[name]
        if not (engine.awake and engine.may_sleep):
            return f"engine {name} cannot go to sleep: it is {engine.state}, and may_sleep is {engine.may_sleep}"
        if not engine.has_stayed and snapshot.free_bytes >= 0:
            return (
                f"engine {name} woke {engine.awake_s:.1f} s ago; it stays for {STAYS:g} times its {engine.wake_s:.1f} s"
            )
        free_bytes += engine.awake_bytes - engine.asleep_bytes
    for name in decision.wake:
        engine = snapshot.engines[name]
        if not engine.sleeps:
            return f"engine {name} is {engine.state} and cannot wake"
        free_bytes -= engine.awake_bytes - engine.asleep_bytes
    if decision.wake and free_bytes < 0:
        return f"the awake engines would need {-free_bytes} bytes more than the budget"
    for engine in snapshot.residences:
        if engine.sleeps and engine.held_s > STARVED_S and engine.name not in decision.wake:
            return f"engine {engine.name} has held requests for {engine.held_s:.0f} s and does not wake"
    return None
