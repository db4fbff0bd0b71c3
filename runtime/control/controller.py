"""The loop: observe, decide, apply, publish; every 100 ms by default, twice as often while memory is short, and at once
when a burst comes.

What an engine, a policy or the telemetry does wrong is in the record and stops nothing. An engine that does not
answer a grant is left alone until it has, or was started again, and memory goes on moving between the others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self

from runtime.control import pins
from runtime.control.contained_policy import ContainedPolicy, Judged
from runtime.control.decision_log import DecisionLog, Outcome, Record
from runtime.control.policy import Decision
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import Snapshotter
from runtime.engines.grant import Applied, Deferred, Grant, ResizeOutcome
from runtime.engines.handle import EngineHandle
from runtime.engines.sharing import GRACE_S, Sharing
from runtime.errors import InputError, NotFound, TroupeError
from runtime.events import Event, JobAdvanced

EVERY_S = 0.1
BURST = "a burst"
PAUSE_S = 0.01
"""Decisions are no closer together than this."""


@dataclass
class Counts:
    """What the controller has done since its start. `reactions_s` are seconds from bursts until the memory that was
    decided for them was there, the last of them."""

    decisions: int = 0
    faults: int = 0
    resizes: int = 0
    rejected: int = 0
    moved_bytes: int = 0
    preempted: int = 0
    reactions_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))


class Controller:
    """Moves memory between the engines of one device. An async context manager: it runs while entered.

    `publish` gets every record; it must not block. All methods are called on the event loop.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        sharing: Sharing,
        observer: Snapshotter,
        guard: ContainedPolicy,
        *,
        every_s: float = EVERY_S,
        grace_s: float = GRACE_S,
        shadow: ContainedPolicy | None = None,
        log: DecisionLog | None = None,
        publish: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.counts = Counts()
        self.paused = False
        self._engines = engines
        self._sharing = sharing
        self._budget_bytes = sharing.ledger.budget_bytes
        self._observer = observer
        self._guard = guard
        self._shadow = shadow
        self._every_s = every_s
        self._grace_s = grace_s
        self._log = log
        self._publish = publish
        self._pinned: dict[str, Grant] = {}
        self._unfit: Mapping[str, str] = {}
        self._fitting: Mapping[str, int] = {}
        self._short = False
        self._wake = asyncio.Event()
        self._cause = "start"
        self._caused_s: float | None = None
        self._failure: str | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="controller")
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._task, *self._settling):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task])

    def hear(self, event: Event) -> None:
        """A listener: calls that become due may be a burst, which is decided about at once."""
        if isinstance(event, JobAdvanced):
            self.look()

    def look(self) -> None:
        """See whether there is a burst."""
        if self._is_burst():
            self.wake(BURST)

    def wake(self, cause: str) -> None:
        """Decide now and not at the next tick."""
        if not self._wake.is_set():
            self._cause = cause
            self._caused_s = asyncio.get_running_loop().time()
            self._wake.set()

    def pause(self) -> None:
        """Decide no more until `resume`; grants stay as they are."""
        self.paused = True

    def resume(self) -> None:
        """Go on deciding."""
        self.paused = False
        self.wake("resumed")

    def pin(self, engine: str, grant: Grant | None = None) -> None:
        """Hold an engine at a grant, by default the one it has; policies divide what is left.

        A pin that no longer fits, because the budget was cut or an engine restarted larger, is not in force until it
        fits again: see `unfit_pins`. Raises NotFound, or InputError if the engine takes no grants now, or if the grant
        is outside its bounds or leaves the other engines less than their floors and pins. Then nothing has changed.
        """
        if engine not in self._engines:
            raise NotFound(f"there is no engine {engine!r}; there are {', '.join(self._engines)}")
        snapshot = self._observe(asyncio.get_running_loop().time())
        if engine not in snapshot.engines:
            state = "silent" if engine in self._sharing.silent else self._engines[engine].stats().state
            raise InputError(f"engine {engine} is {state} and takes no grant now; pin it once it is ready")
        others = {name: held for name, held in self._pinned.items() if name != engine}
        pinned = {**others, engine: grant or snapshot.engines[engine].grant}
        if complaint := pins.fit(snapshot, pinned).unfit.get(engine):
            raise InputError(f"engine {engine}: {complaint}")
        self._pinned = pinned
        self.wake(f"{engine} is pinned")

    def unpin(self, engine: str) -> None:
        """Let policies decide about an engine again."""
        self._pinned.pop(engine, None)
        self.wake(f"{engine} is no longer pinned")

    @property
    def pinned(self) -> Mapping[str, Grant]:
        """The engines that are held, and at what, the oldest pin first."""
        return self._pinned

    @property
    def unfit_pins(self) -> Mapping[str, str]:
        """Return why pins are not in force, by engine: they do not fit the budget or the engine as it is now."""
        return {name: why for name, why in self._unfit.items() if name in self._pinned}

    @property
    def policy(self) -> str:
        """The name of the policy that decides."""
        return self._guard.name

    def use(self, guard: ContainedPolicy, budget_bytes: int | None = None) -> None:
        """Let another policy decide from now on; within another budget, where one is given."""
        self._guard = guard
        self._budget_bytes = budget_bytes or self._budget_bytes
        self.wake(f"policy {guard.name}")

    def _is_burst(self) -> bool:
        """Whether an engine has more calls than it has memory for, and had not at the last decision."""
        return any(count > self._fitting.get(name, 0) for name, count in self._observer.in_flight().items())

    async def _run(self) -> None:
        while True:
            self._wake.clear()  # what comes from here on is not in the snapshot, and wakes the loop again
            if not self.paused:
                try:
                    await self.tick()
                    self._failure = None
                except Exception as error:
                    self.counts.faults += 1
                    if repr(error) != self._failure:  # else it is in the log already
                        self._failure = repr(error)
                        logging.getLogger(__name__).exception("a tick of the controller failed")
                    await asyncio.sleep(self._every_s)  # a burst would wake it again at once, and not help
            await asyncio.sleep(PAUSE_S)
            # What an engine needs no longer is noticed at the next tick, and is worth noticing where another waits.
            every_s = self._every_s / 2 if self._short else self._every_s
            with suppress(TimeoutError):
                async with asyncio.timeout(max(every_s - PAUSE_S, 0)):
                    await self._wake.wait()

    async def tick(self) -> None:
        """Observe, decide, apply and publish once. Raises what engines or telemetry raise."""
        clock = asyncio.get_running_loop().time
        cause, self._cause = self._cause, "tick"
        now_s, caused_s, self._caused_s = clock(), self._caused_s, None
        started = now_s if caused_s is None else caused_s
        snapshot = self._observe(now_s)
        self._note_room(snapshot, {})  # for calls that come while a policy decides in a thread; below, for later ones
        pinned = pins.fit(snapshot, self._pinned)
        self._report(pinned.unfit)
        for_policies = pinned.rest(snapshot)
        judged = await self._guard.decide(for_policies) if for_policies.engines else Judged(Decision())
        record = Record(self._guard.name, cause, snapshot, judged.decision, judged.fault, unfit_pins=pinned.unfit)
        self.counts.decisions += 1
        self.counts.faults += judged.fault is not None
        if self._shadow is not None and for_policies.engines:
            shadow = await self._shadow.decide(for_policies)
            record = replace(record, shadow_policy=self._shadow.name, shadow=shadow.decision, shadow_fault=shadow.fault)
        self._note_room(snapshot, judged.decision.grants if judged.decision else {})
        grants = {**(judged.decision.grants if judged.decision else {}), **pinned.in_force}
        outcomes = await self._apply(snapshot, grants)
        record = replace(record, outcomes={name: Outcome.of(outcome) for name, outcome in outcomes.items()})
        self._count(record)
        if cause == BURST and outcomes:
            task = asyncio.create_task(self._time_reaction(started, outcomes), name="time a reaction")
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
        self._tell(replace(record, seconds=clock() - started))

    def _observe(self, now_s: float) -> Snapshot:
        ledger = self._sharing.ledger
        snapshot = self._observer.observe(now_s, self._budget_bytes, sum(ledger.held.values()))
        views = {name: view for name, view in snapshot.engines.items() if name not in self._sharing.silent}
        snapshot = replace(snapshot, engines=views)
        away = sum(held for name, held in ledger.held.items() if name not in snapshot.engines)
        ledger.budget_bytes = snapshot.budget_bytes
        # What engines that restart come back to, and what those hold that do not answer, is not to be divided.
        return replace(snapshot, budget_bytes=snapshot.budget_bytes - away)

    def _report(self, unfit: Mapping[str, str]) -> None:
        """Log each pin that has ceased to fit, once."""
        for name in unfit.keys() - self._unfit.keys():
            logging.getLogger(__name__).warning("the pin of engine %s is not in force: %s", name, unfit[name])
        self._unfit = unfit

    async def _apply(self, snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, ResizeOutcome]:
        """Move what the grants change."""
        changed = {name: grant for name, grant in grants.items() if grant != snapshot.engines[name].grant}
        return await self._sharing.resize(changed, self._grace_s) if changed else {}

    def _count(self, record: Record) -> None:
        for outcome in record.outcomes.values():
            self.counts.resizes += outcome.state != "rejected"
            self.counts.rejected += outcome.state == "rejected"
            self.counts.moved_bytes += outcome.moved_bytes
            self.counts.preempted += outcome.preempted

    async def _time_reaction(self, since_s: float, outcomes: Mapping[str, ResizeOutcome]) -> None:
        """Note when all memory of a decision is where it should be; not where a newer one came first."""
        # Shielded: what is settled belongs to those who settle it, also when this task is cancelled.
        settled = [await asyncio.shield(o.settled) if isinstance(o, Deferred) else o for o in outcomes.values()]
        if all(isinstance(outcome, Applied) for outcome in settled):
            self.counts.reactions_s.append(asyncio.get_running_loop().time() - since_s)

    def _note_room(self, snapshot: Snapshot, grants: Mapping[str, Grant]) -> None:
        """How many calls each engine has memory or already calls for, with what it is granted now: more than that is a
        burst."""
        views = snapshot.engines
        sizes = {name: view.kv_cache_bytes for name, view in views.items()}
        sizes |= {n: views[n].limits.kv_cache_bytes(grant.gpu_memory_utilization) for n, grant in grants.items()}
        room = {name: int(sizes[name] / max(view.sequence_bytes, 1)) for name, view in views.items()}
        self._fitting = {name: max(room[name], view.in_flight) for name, view in views.items()}
        self._short = self._fitting != room

    def _tell(self, record: Record) -> None:
        if self._log is not None:
            try:
                self._log.write(record)
            except TroupeError as error:  # a full disk is no reason to stop moving memory
                logging.getLogger(__name__).warning("%s; decisions are no longer logged", error)
                self._log = None
        self._publish(record)
