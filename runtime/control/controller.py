"""The control loop: take a snapshot, ask the policy, apply its grants, publish the record.

It runs every 100 ms by default, twice as often while memory is short, and at once on a burst of calls. Faults of an
engine, a policy or the telemetry are recorded and stop nothing. An engine that does not answer a resize is left alone
until it answers or restarts, while memory keeps moving between the others. An engine whose admission is paused for too
long admits requests again, even if no policy decides.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

from runtime.control import burst, pauses, pins
from runtime.control.contained_policy import Answer, ContainedPolicy, held_bytes, without_starving
from runtime.control.decision_log import DecisionLog, Outcome, Record
from runtime.control.policy import Decision, unchanged
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import Snapshotter
from runtime.engines.grant import Applied, Deferred, Grant, ResizeOutcome
from runtime.engines.handle import EngineHandle
from runtime.engines.sharing import GRACE_S, Sharing
from runtime.errors import TroupeError
from runtime.events import CallPaused, Event, JobAdvanced

EVERY_S = 0.1
BURST = "a burst"
MIN_PAUSE_S = 0.01
"""Shortest pause between two decisions."""


@dataclass
class Counts:
    """Counts since the controller was created.

    `reactions_s` are the latest reaction times: seconds from a burst until all memory decided for it was available.
    """

    decisions: int = 0
    faults: int = 0
    resizes: int = 0
    rejected: int = 0
    moved_bytes: int = 0
    preempted: int = 0
    reactions_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def include(self, other: "Counts") -> None:
        """Add the counts of another controller."""
        self.decisions += other.decisions
        self.faults += other.faults
        self.resizes += other.resizes
        self.rejected += other.rejected
        self.moved_bytes += other.moved_bytes
        self.preempted += other.preempted
        self.reactions_s.extend(other.reactions_s)

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        """Count the outcomes of a decision."""
        for outcome in outcomes.values():
            self.resizes += outcome.state != "rejected"
            self.rejected += outcome.state == "rejected"
            self.moved_bytes += outcome.moved_bytes
            self.preempted += outcome.preempted


class Controller:
    """The owner of the control loop over the engines of one device.

    An async context manager: the loop runs while it is entered. `publish` is called with every record, which names the
    device, and must not block. All methods must be called on the event loop. `snapshot` is the newest one, None until
    the first tick.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        sharing: Sharing,
        snapshotter: Snapshotter,
        policy: ContainedPolicy,
        *,
        every_s: float = EVERY_S,
        grace_s: float = GRACE_S,
        shadow: ContainedPolicy | None = None,
        log: DecisionLog | None = None,
        publish: Callable[[Record], None] = lambda record: None,
        device: str = "0",
    ) -> None:
        self.counts = Counts()
        self.paused = False
        self.snapshot: Snapshot | None = None
        self.engines = engines
        self._sharing = sharing
        self._snapshotter = snapshotter
        self._policy = policy
        self._shadow = shadow
        self._every_s = every_s
        self._grace_s = grace_s
        self._log = log
        self._publish = publish
        self._device = device
        self._pinned: dict[str, Grant] = {}
        self._unfit: Mapping[str, str] = {}
        self._bursts = burst.BurstDetector()
        self._wake = asyncio.Event()
        self._cause = "start"
        self._caused_s: float | None = None
        self._logged_failure: str | None = None
        self._timing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="controller")
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._task, *self._timing):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task])

    def on_event(self, event: Event) -> None:
        """Check for a burst when calls of a job become due. This is a listener of events."""
        if isinstance(event, JobAdvanced | CallPaused):
            self.look()

    def look(self) -> None:
        """Check for a burst, and decide at once if there is one."""
        if self._bursts.newly_short(self._snapshotter.in_flight()):
            self.wake(BURST)

    def wake(self, cause: str) -> None:
        """Decide now instead of at the next tick. `cause` goes into the record."""
        if not self._wake.is_set():
            self._cause = cause
            self._caused_s = asyncio.get_running_loop().time()
            self._wake.set()

    def pause(self) -> None:
        """Stop deciding until `resume`. Grants stay as they are, with two exceptions.

        Engines whose admission is paused admit requests again, and engines shrink for one that wakes.
        """
        self.paused = True

    def resume(self) -> None:
        """Start deciding again."""
        self.paused = False
        self.wake("resumed")

    def current_grant(self, engine: str) -> Grant:
        """Return an engine's grant, with its admission open.

        Raises NotFound, or InputError if the engine takes no grants now.
        """
        return pins.current_grant(self.engines, self._sharing.silent, engine)

    def pin(self, engine: str, grant: Grant) -> None:
        """Hold an engine at a grant; policies divide the rest of the budget.

        The pin of an engine that takes no grants now is in force once it does. A pin that no longer fits, because the
        budget was cut or an engine restarted larger, is not in force until it fits again: see `unfit_pins`. Raises
        NotFound, and InputError if the grant is outside the engine's bounds or leaves the other engines less than their
        floors and pins. On an error nothing changes.
        """
        pins.require(self.engines, engine)
        snapshot = self._take_snapshot(asyncio.get_running_loop().time())
        self._pinned = pins.with_pin(snapshot, self._pinned, engine, grant)
        self.wake(f"{engine} is pinned")

    def unpin(self, engine: str) -> None:
        """Let policies decide about an engine again. Raises NotFound."""
        pins.require(self.engines, engine)
        self._pinned.pop(engine, None)
        self.wake(f"{engine} is no longer pinned")

    @property
    def pinned(self) -> Mapping[str, Grant]:
        """The grants of the pinned engines, the oldest pin first."""
        return self._pinned

    @property
    def unfit_pins(self) -> Mapping[str, str]:
        """Return, by engine, why a pin is not in force: it does not fit the current budget or the engine's bounds."""
        return {name: why for name, why in self._unfit.items() if name in self._pinned}

    @property
    def policy(self) -> str:
        """The name of the policy that decides."""
        return self._policy.name

    def use(self, policy: ContainedPolicy, budget_bytes: int | None = None) -> None:
        """Let another policy decide from now on, within another budget if one is given."""
        self._policy = policy
        if budget_bytes is not None:
            self._sharing.ledger.full_budget_bytes = budget_bytes
        self.wake(f"policy {policy.name}")

    async def _run(self) -> None:
        while True:
            self._wake.clear()  # before the snapshot, so that a burst after it causes another tick
            try:
                if self.paused:
                    await self._end_pauses()
                else:
                    await self.tick()
                self._logged_failure = None
            except Exception as error:
                self.counts.faults += 1
                if repr(error) != self._logged_failure:  # log a failure that repeats only once
                    self._logged_failure = repr(error)
                    logging.getLogger(__name__).exception("a tick of the controller failed")
                await asyncio.sleep(self._every_s)  # bursts would otherwise retry a failing tick at once
            await asyncio.sleep(MIN_PAUSE_S)
            # Freed memory is only seen at the next tick, so tick twice as fast while any engine is short.
            every_s = self._every_s / 2 if self._bursts.any_short else self._every_s
            with suppress(TimeoutError):
                async with asyncio.timeout(max(every_s - MIN_PAUSE_S, 0)):
                    await self._wake.wait()

    async def tick(self) -> None:
        """Take a snapshot, decide, apply and publish, once. Raises what engines or telemetry raise."""
        now_s = asyncio.get_running_loop().time()
        cause, since_s = self._next_cause(now_s)
        snapshot = self._take_snapshot(now_s)
        calls = self._snapshotter.in_flight()
        self._note_decision(calls, snapshot, {})  # calls may arrive while a policy decides in a thread
        pinned = pins.fit(snapshot, self._pinned)
        self._warn_of_unfit_pins(pinned.unfit)
        rest = pinned.rest(snapshot)
        policy = self._policy.name
        answer = await self._decide(rest)
        self._note_decision(calls, snapshot, answer.grants)
        decision = self._with_room_for_wakes(rest, answer.decision)
        outcomes = await self._apply(snapshot, {**decision.grants, **pinned.in_force})
        if cause == BURST and outcomes:
            self._start_timing(since_s, outcomes)
        seconds = asyncio.get_running_loop().time() - since_s
        # Last, because a shadow that is slow must not hold up the decision in force.
        shadow = await self._shadow.decide(rest) if self._shadow and rest.engines else None
        record = Record(
            policy,
            cause,
            snapshot,
            answer.decision,
            answer.fault,
            outcomes={name: Outcome.of(outcome) for name, outcome in outcomes.items()},
            seconds=seconds,
            shadow_policy=self._shadow.name if self._shadow and shadow else None,
            shadow=shadow.decision if shadow else None,
            shadow_fault=shadow.fault if shadow else None,
            unfit_pins=pinned.unfit,
            device=self._device,
        )
        self.counts.add(record.outcomes)
        self._write(record)

    async def _end_pauses(self) -> None:
        """Let every engine admit requests that a policy paused. Only an engine that wakes makes others shrink."""
        snapshot = self._take_snapshot(asyncio.get_running_loop().time())
        self._note_decision(self._snapshotter.in_flight(), snapshot, {})
        decision = self._with_room_for_wakes(pins.fit(snapshot, self._pinned).rest(snapshot), None)
        await self._apply(snapshot, {**pauses.end_all(snapshot), **decision.grants})

    def _with_room_for_wakes(self, snapshot: Snapshot, decision: Decision | None) -> Decision:
        """Return a policy's decision, or another one if it leaves less memory than engines wait for to wake.

        Without a decision and without such an engine, nothing changes but pauses that are overdue.
        """
        short = self._sharing.reserved_bytes > max(self._sharing.ledger.free, 0)
        if decision is not None and not (short and held_bytes(snapshot, decision.grants) > snapshot.budget_bytes):
            return decision
        return without_starving(snapshot, unchanged(snapshot, "an engine wakes") if short else Decision())

    def _next_cause(self, now_s: float) -> tuple[str, float]:
        """Return why and since when a decision is due, and reset both."""
        cause, since_s = self._cause, now_s if self._caused_s is None else self._caused_s
        self._cause, self._caused_s = "tick", None
        return cause, since_s

    def _take_snapshot(self, now_s: float) -> Snapshot:
        """Take and keep a snapshot of the engines that answer, with the budget that is left for them."""
        self._sharing.release_failed()
        ledger = self._sharing.ledger
        snapshot = self._snapshotter.take(now_s, ledger.full_budget_bytes, sum(ledger.held.values()))
        ledger.budget_bytes = snapshot.budget_bytes
        views = {name: view for name, view in snapshot.engines.items() if name not in self._sharing.silent}
        # Memory is reserved for engines that restart or wake, and for those that hold it without answering.
        reserved_bytes = sum(held for name, held in ledger.held.items() if name not in views)
        reserved_bytes += self._sharing.reserved_bytes
        self.snapshot = replace(snapshot, engines=views, budget_bytes=snapshot.budget_bytes - reserved_bytes)
        return self.snapshot

    async def _decide(self, snapshot: Snapshot) -> Answer:
        """Return the policy's answer. Do not ask it if all engines are pinned."""
        answer = await self._policy.decide(snapshot) if snapshot.engines else Answer(Decision())
        self.counts.decisions += 1
        self.counts.faults += answer.fault is not None
        return answer

    async def _apply(self, snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, ResizeOutcome]:
        """Resize the engines whose grants change. Serve engines that wait to wake even if none does.

        An engine that waits for memory to grow further stops waiting if the decision keeps its present grant.
        """
        waiting = self._sharing.waiting
        changed = {
            name: grant for name, grant in grants.items() if grant != snapshot.engines[name].grant or name in waiting
        }
        return await self._sharing.resize(changed, self._grace_s) if changed or self._sharing.reserved_bytes else {}

    def _note_decision(self, calls: Mapping[str, int], snapshot: Snapshot, grants: Mapping[str, Grant]) -> None:
        self._bursts.note_decision(calls, burst.capacity(snapshot, grants))

    def _start_timing(self, since_s: float, outcomes: Mapping[str, ResizeOutcome]) -> None:
        task = asyncio.create_task(self._time_reaction(since_s, outcomes), name="time a reaction")
        self._timing.add(task)
        task.add_done_callback(self._timing.discard)

    async def _time_reaction(self, since_s: float, outcomes: Mapping[str, ResizeOutcome]) -> None:
        """Record the reaction time once all memory of a decision is in place, unless a newer decision replaced it."""
        # Shielded: cancelling this task must not cancel a future that the engines and other waiters share.
        settled = [await asyncio.shield(o.settled) if isinstance(o, Deferred) else o for o in outcomes.values()]
        if all(isinstance(outcome, Applied) for outcome in settled):
            self.counts.reactions_s.append(asyncio.get_running_loop().time() - since_s)

    def _warn_of_unfit_pins(self, unfit: Mapping[str, str]) -> None:
        """Log each pin once when it stops fitting."""
        for name in unfit.keys() - self._unfit.keys():
            logging.getLogger(__name__).warning("the pin of engine %s is not in force: %s", name, unfit[name])
        self._unfit = unfit

    def _write(self, record: Record) -> None:
        """Log and publish a record."""
        if self._log is not None:
            try:
                self._log.write(record)
            except TroupeError as error:  # memory must keep moving when the disk is full
                logging.getLogger(__name__).warning("%s; decisions are no longer logged", error)
                self._log = None
        self._publish(record)
