"""Moves memory between the engines of one device: donors shrink first, then recipients grow by what was released.

`memory_plan` decides who gives and who gets; this module asks the engines and keeps the ledger. At every instant the
ledger's claims cover what the engines physically hold, because an engine claims memory before it grows and lowers its
claim only after it has released memory.
"""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

from runtime.engines import memory_plan
from runtime.engines.grant import Applied, Deferred, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import ABLE_TO_WAKE, EngineHandle, EngineState
from runtime.engines.ledger import Ledger, OverBudget
from runtime.engines.memory_plan import Growth, Position
from runtime.errors import EngineError

DRAIN_S = 60.0
"""Seconds for which the requests of an engine whose admission is paused may use memory that it gives up."""
GRACE_S = 0.5
"""Default time that running requests have to finish before a shrink preempts them."""
ANSWER_S = 1.0
"""The longest wait of a decision for an engine's answer. It then continues with the other engines."""

Settled = Applied | Rejected | Superseded
RESTING = (
    EngineState.DRAINING,
    EngineState.ASLEEP,
    EngineState.COLD,
    EngineState.WAKING,
    EngineState.ABSENT,
    EngineState.FAILED,
)
"""States in which an engine's claim, and not its last grant, says what it holds."""


@dataclass
class _Decision:
    """A decision that can be undone: the donors' grants before it, and what has happened since."""

    donors_before: dict[str, Grant] = field(default_factory=dict)
    recipient_failed: bool = False
    rolled_back: set[str] = field(default_factory=set)


@dataclass
class _Waiting:
    """A recipient that waits for memory. `last` is the outcome of the latest step by which it has grown."""

    grant: Grant
    decision: _Decision
    last: Applied | None
    settled: "asyncio.Future[Settled]"


@dataclass
class _Admission:
    """An engine that waits for memory to wake, and the claim that it waits for."""

    nbytes: int
    claimed: "asyncio.Future[None]"


class Sharing:
    """The engines of one device and the ledger of their memory.

    The engines must have started, and the ledger must hold their claims. One decision is carried out at a time.
    """

    def __init__(self, engines: Mapping[str, EngineHandle], ledger: Ledger) -> None:
        self._engines = engines
        self.ledger = ledger
        self._waiting: dict[str, _Waiting] = {}
        self._admissions: dict[str, _Admission] = {}
        self._waking: set[str] = set()
        self._one_at_a_time = asyncio.Lock()
        self._deferred: dict[asyncio.Task[None], str] = {}  # tasks that wait for deferred shrinks, and their engines
        self._late: dict[str, asyncio.Task[None]] = {}

    @property
    def silent(self) -> Collection[str]:
        """The engines that have not answered their latest grant. Their claims cover the most that they may hold."""
        return self._late.keys()

    @property
    def waiting(self) -> Collection[str]:
        """The engines that wait for memory to grow to their latest grant. They have grown by what was free."""
        return self._waiting.keys()

    @property
    def reserved_bytes(self) -> int:
        """The bytes that engines which wait in `admit` still need. Decisions must leave them free."""
        return sum(admission.nbytes - self._claimed(name) for name, admission in self._admissions.items())

    async def admit(self, name: str, nbytes: int) -> None:
        """Claim `nbytes` for an engine that will wake. Wait until the other engines have released enough.

        A cancelled call claims nothing.
        """
        async with self._one_at_a_time:
            before = self._claimed(name)
            admission = self._admissions[name] = _Admission(nbytes, asyncio.get_running_loop().create_future())
            self._serve_admissions()
        try:
            await admission.claimed
        except asyncio.CancelledError:
            if self._admissions.pop(name, None) is None:  # the claim was made just before
                self.ledger.record(name, before)
            raise

    async def wake(self, name: str, most_s: float | None = None) -> None:
        """Wake an engine once there is memory for it.

        Raises EngineError, and claims nothing, if the engine does not wake, if it gets no memory within `most_s`, or if
        another call wakes it already.
        """
        engine = self._engines[name]
        if name in self._waking or engine.state not in ABLE_TO_WAKE:
            state = EngineState.WAKING if name in self._waking else engine.state
            raise EngineError(f"engine {name} is {state} and cannot wake")
        self._waking.add(name)
        try:
            await self._wake(engine, most_s)
        finally:
            self._waking.discard(name)

    async def _wake(self, engine: EngineHandle, most_s: float | None) -> None:
        """Claim memory for an engine that no other call wakes, then wake it."""
        name = engine.name
        try:
            async with asyncio.timeout(most_s):
                await self.admit(name, engine.limits.smallest_bytes)
        except TimeoutError:
            raise EngineError(f"engine {name}: the others did not release enough memory within {most_s:g} s") from None
        try:
            await engine.wake()
        except EngineError:
            await self._lower(name, 0)
            raise
        # It may have measured itself a little larger.
        self.ledger.record(name, max(self.ledger.held[name], engine.held_bytes))

    async def release(self, name: str, nbytes: int) -> None:
        """Lower the claim of an engine that sleeps to the `nbytes` that it still holds.

        Does nothing if the engine wakes already: the claim is then for its wake.
        """
        if name not in self._waking:
            await self._lower(name, nbytes)

    async def _lower(self, name: str, nbytes: int) -> None:
        """Lower the claim of an engine, and give the memory to those that wait for some."""
        async with self._one_at_a_time:
            self._supersede(name)
            self.ledger.record(name, nbytes)
            await self._serve_waiting()

    async def resize(self, grants: Mapping[str, Grant], grace_s: float = GRACE_S) -> dict[str, ResizeOutcome]:
        """Carry out one decision and return an outcome for each of its grants.

        - Applied: the grant is in force.
        - Deferred: for a donor, running requests still use memory that it has to release. For a recipient, donors have
          yet to release memory; the recipient has grown by what was free.
        - Rejected: the grant is impossible, or the engine could not apply it. If one grant of the decision is
          impossible, or all together exceed the budget, all are rejected and nothing changes. If a recipient fails, its
          donors get back what is still free of what they gave.

        A newer grant for an engine supersedes its deferred one. `grace_s` is how long running requests may use memory
        that their engine has to release.
        """
        async with self._one_at_a_time:
            self._record_restarts()
            positions = {name: self._position(name) for name in self._engines}
            plan = memory_plan.plan(positions, grants, self.ledger.budget_bytes)
            if plan.rejected:
                return {name: Rejected(grant, plan.rejected[name]) for name, grant in grants.items()}
            return await self._carry_out(plan, grants, grace_s)

    async def _carry_out(
        self, plan: memory_plan.Plan, grants: Mapping[str, Grant], grace_s: float
    ) -> dict[str, ResizeOutcome]:
        for name in grants:
            self._supersede(name)
        decision = _Decision({name: self._current(name) for name in plan.shrink})
        shrunk = await asyncio.gather(*(self._shrink(name, grant, grace_s) for name, grant in plan.shrink.items()))
        outcomes: dict[str, ResizeOutcome] = dict(zip(plan.shrink, shrunk, strict=True))
        growths = self._plan_growth(plan.grow)
        grown = await asyncio.gather(
            *(self._grow(name, grant, growths[name], decision, grace_s) for name, grant in plan.grow.items())
        )
        outcomes |= zip(plan.grow, grown, strict=True)
        await self._roll_back(decision)
        self._serve_admissions()
        for name in decision.rolled_back:
            outcomes[name] = Rejected(grants[name], f"engine {name}: rolled back, because a recipient could not grow")
        return outcomes

    async def close(self) -> None:
        """Stop waiting for engines. Grants that still wait for memory settle as Superseded."""
        for name in list(self._waiting):
            self._supersede(name)
        tasks = [*self._deferred, *self._late.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def release_failed(self) -> None:
        """Lower the claims of engines that have failed to 0. They have no process and are not restarted."""
        for name, engine in self._engines.items():
            if self._claimed(name) and engine.state is EngineState.FAILED:
                self.ledger.record(name, 0)

    def _record_restarts(self) -> None:
        """Raise the claims of engines that restarted with a larger grant than they had, because their floor rose."""
        for name, engine in self._engines.items():
            if engine.state is EngineState.READY and name not in self._late:
                self.ledger.record(name, max(self._claimed(name), self._bytes(name, self._current(name))))

    def _position(self, name: str) -> Position:
        state, claimed_bytes = self._engines[name].state, self._claimed(name)
        unavailable = None if state is EngineState.READY else f"engine {name} is {state}"
        if name in self._late or state in RESTING:  # it holds its claim at most
            unavailable = unavailable or f"engine {name} has not answered its last grant yet"
            settled_bytes = claimed_bytes
        else:
            waiting = self._waiting.get(name)
            settled_bytes = self._bytes(name, waiting.grant if waiting else self._current(name))
        return Position(self._engines[name].limits, claimed_bytes, settled_bytes, unavailable)

    def _plan_growth(self, grants: Mapping[str, Grant], step_bytes: int = memory_plan.STEP_BYTES) -> dict[str, Growth]:
        limits = {name: self._engines[name].limits for name in grants}
        return memory_plan.plan_growth(grants, limits, self.ledger.held, self.ledger.free, step_bytes)

    def _claimed(self, name: str) -> int:
        return self.ledger.held[name]

    def _current(self, name: str) -> Grant:
        grant = self._engines[name].stats().grant
        assert grant is not None, f"engine {name} has not started"
        return grant

    def _bytes(self, name: str, grant: Grant) -> int:
        return self._engines[name].limits.held_bytes(grant.gpu_memory_utilization)

    async def _ask(self, name: str, grant: Grant, grace_s: float = 0) -> ResizeOutcome | None:
        """Return an engine's answer to a grant, or None if it does not answer in time.

        The engine is then silent until it answers. Its claim stays at the most that it may hold.
        """
        answer = asyncio.ensure_future(self._engines[name].resize(grant, grace_s))
        done, _ = await asyncio.wait([answer], timeout=ANSWER_S)
        if done:
            return answer.result()
        self._late[name] = asyncio.create_task(self._take_late_answer(name, grant, answer), name=f"answer of {name}")
        return None

    async def _take_late_answer(self, name: str, grant: Grant, answer: "asyncio.Future[ResizeOutcome]") -> None:
        """Wait until a silent engine has answered or was restarted, then lower its claim to what it holds.

        If an earlier shrink of it is still deferred, `_finish_shrink` lowers the claim.
        """
        outcome = await answer
        async with self._one_at_a_time:
            del self._late[name]
            if isinstance(outcome, Deferred):
                self._defer(name, grant, outcome)
            elif self._engines[name].state not in RESTING and name not in self._deferred.values():
                self.ledger.claim(name, min(self._claimed(name), self._bytes(name, self._current(name))))
            await self._serve_waiting()

    async def _shrink(self, name: str, grant: Grant, grace_s: float) -> ResizeOutcome:
        if grant.max_active_seqs == 0 and not grant.preempt:
            grace_s = max(grace_s, DRAIN_S)  # its requests could not be admitted again after a preemption
        outcome = await self._ask(name, grant, grace_s)
        if isinstance(outcome, Applied):
            self.ledger.claim(name, self._bytes(name, grant))
        elif isinstance(outcome, Deferred):
            self._defer(name, grant, outcome)
        return outcome or _no_answer(name, grant)

    def _defer(self, name: str, grant: Grant, deferred: Deferred) -> None:
        """Lower a donor's claim by what it has released, and lower it again once it has released the rest."""
        self.ledger.claim(name, min(self._claimed(name), self._bytes(name, grant) + deferred.held_bytes))
        self._deferred[asyncio.create_task(self._finish_shrink(name, deferred), name=f"shrink {name}")] = name

    async def _finish_shrink(self, name: str, deferred: Deferred) -> None:
        """Wait for a deferred shrink, then lower the donor's claim and let waiting recipients grow.

        Rejected means that the engine died. Its memory is free then too, and it restarts with this grant.
        """
        outcome = await deferred.settled
        async with self._one_at_a_time:
            del self._deferred[cast("asyncio.Task[None]", asyncio.current_task())]
            # If the engine was granted something else meanwhile, the newer grant accounts for its memory, also while
            # its answer is awaited. If it went to sleep, `release` does.
            newest = self._engines[name].stats().grant == deferred.grant and name not in self._late
            if not isinstance(outcome, Superseded) and newest:
                self.ledger.claim(name, min(self._claimed(name), self._bytes(name, deferred.grant)))
            await self._serve_waiting()

    async def _grow(
        self, name: str, grant: Grant, growth: Growth, decision: _Decision, grace_s: float
    ) -> ResizeOutcome:
        """Grow an engine as far as planned. If memory is missing and donors have yet to release some, let it wait."""
        outcome = await self._take(name, growth.now, decision) if growth.now else None
        if growth.complete or isinstance(outcome, Rejected):
            assert outcome is not None
            return outcome
        if not self._deferred:
            return outcome or _too_little_released(name, grant)
        settled: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._waiting[name] = _Waiting(grant, decision, outcome, settled)
        return Deferred(grant, growth.missing_bytes, grace_s, settled)

    async def _take(self, name: str, grant: Grant, decision: _Decision) -> Applied | Rejected:
        """Claim the memory of a grant, then ask the engine to take it. Restore the claim if the engine refuses."""
        if (state := self._engines[name].state) in RESTING:  # it has gone to sleep since the plan was made
            return Rejected(grant, f"engine {name} is {state}")
        claimed_before, grant_before = self._claimed(name), self._current(name)
        self.ledger.claim(name, self._bytes(name, grant))
        outcome = await self._ask(name, grant)
        if outcome is None:
            return _no_answer(name, grant)
        assert not isinstance(outcome, Deferred), "engines never defer growth"
        if isinstance(outcome, Rejected):
            self.ledger.claim(name, max(claimed_before, self._bytes(name, grant_before)))
            decision.recipient_failed |= self._bytes(name, grant) > claimed_before
        return outcome

    async def _roll_back(self, decision: _Decision) -> None:
        """Give the donors back the free part of what they gave, if a recipient of the decision has failed."""
        if not decision.recipient_failed:
            return
        for name, before in decision.donors_before.items():
            back = self._plan_growth({name: before}, step_bytes=1)[name].now
            if back is None or self._bytes(name, back) <= self._claimed(name):
                continue
            self.ledger.claim(name, self._bytes(name, back))
            outcome = await self._ask(name, back)
            if isinstance(outcome, Applied):
                decision.rolled_back.add(name)
            elif outcome is not None and self._engines[name].state not in RESTING:
                self.ledger.claim(name, self._bytes(name, self._current(name)))
        decision.donors_before.clear()
        decision.recipient_failed = False

    async def _serve_waiting(self) -> None:
        """Let waiting recipients grow by the memory that was released, in the order in which they began to wait.

        Engines that wait for memory to wake come first.
        """
        self._serve_admissions()
        for name in tuple(self._waiting):
            waiting = self._waiting[name]
            outcome = await self._serve(name, waiting)
            if outcome is not None:
                del self._waiting[name]
                waiting.settled.set_result(outcome)

    def _serve_admissions(self) -> None:
        """Make the claims of engines that wait to wake, in the order in which they began to wait, while they fit."""
        for name in tuple(self._admissions):
            admission = self._admissions[name]
            try:
                self.ledger.claim(name, admission.nbytes)
            except OverBudget:
                return
            del self._admissions[name]
            admission.claimed.set_result(None)

    async def _serve(self, name: str, waiting: _Waiting) -> Settled | None:
        """Grow one waiting recipient. Return its final outcome, or None if it still waits."""
        growth = self._plan_growth({name: waiting.grant})[name]
        outcome = await self._take(name, growth.now, waiting.decision) if growth.now else None
        await self._roll_back(waiting.decision)
        if growth.complete or isinstance(outcome, Rejected):
            return outcome
        waiting.last = outcome or waiting.last
        if self._deferred:
            return None
        return waiting.last or _too_little_released(name, waiting.grant)

    def _supersede(self, name: str) -> None:
        waiting = self._waiting.pop(name, None)
        if waiting:
            waiting.settled.set_result(Superseded(waiting.grant))


def _no_answer(name: str, grant: Grant) -> Rejected:
    return Rejected(
        grant, f"engine {name} has not answered for {ANSWER_S:g} s; Troupe resizes it again once it answers"
    )


def _too_little_released(name: str, grant: Grant) -> Rejected:
    return Rejected(grant, f"engine {name}: donors released too little memory; the engine keeps its current grant")
