"""Memory that moves between the engines of one device: donors first, recipients out of what was released.

Grants come together as one decision. The ledger keeps what is physically held within the budget at every instant: an
engine claims before it grows, and gives up its claim once memory was released.
"""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

from runtime.engines.grant import Applied, Deferred, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.ledger import Ledger

GRACE_S = 0.5
"""Default: what is in use above the line may finish for so long."""
ANSWER_S = 1.0
"""An engine that takes longer to answer is left alone until it has, and the others go on."""
_STEP_BYTES = 1 << 20
"""A recipient that has to wait grows by no less than this at a time."""

Settled = Applied | Rejected | Superseded


@dataclass
class _Decision:
    """Grants that came together: what its donors held before, whether a recipient has failed, and who has it back since
    then."""

    before: dict[str, Grant] = field(default_factory=dict)
    failed: bool = False
    rolled_back: set[str] = field(default_factory=set)


@dataclass
class _Wanting:
    """A recipient whose memory is not all released yet, and what it has grown by so far."""

    grant: Grant
    decision: _Decision
    part: Applied | None
    settled: "asyncio.Future[Settled]"


class Sharing:
    """The engines of one device and their ledger. Engines must be up and hold what their `stats` say."""

    def __init__(self, engines: Mapping[str, EngineHandle], ledger: Ledger) -> None:
        self._engines = engines
        self.ledger = ledger
        self._wanting: dict[str, _Wanting] = {}
        self._moving = asyncio.Lock()
        self._settling: set[asyncio.Task[None]] = set()
        self._late: dict[str, asyncio.Task[None]] = {}

    @property
    def silent(self) -> Collection[str]:
        """Engines that have not answered their last grant yet: what they hold is not known, and their claims stand."""
        return self._late.keys()

    async def resize(self, grants: Mapping[str, Grant], grace_s: float = GRACE_S) -> dict[str, ResizeOutcome]:
        """Apply a decision; an outcome for every grant.

        Rejected where the grant cannot be, and for all where together they go beyond the budget: then nothing has
        changed. Where a recipient fails, its donors get back what they gave. Deferred where memory is still in use: for
        a donor until it has let go, for a recipient until its donors have; it has grown by what there was. A newer
        grant for an engine supersedes a deferred one.
        """
        async with self._moving:
            self._note_restarts()
            if complaints := self._complaints(grants):
                return dict(complaints)
            return await self._move(grants, grace_s)

    async def _move(self, grants: Mapping[str, Grant], grace_s: float) -> dict[str, ResizeOutcome]:
        decision = _Decision()
        for name in grants:
            self._supersede(name)
        donors = {name: grant for name, grant in grants.items() if self._bytes(name, grant) < self._held(name)}
        for name in donors:
            decision.before[name] = self._now(name)
        found = await asyncio.gather(*(self._shrink(name, grant, grace_s) for name, grant in donors.items()))
        outcomes = dict(zip(donors, found, strict=True))
        recipients = {name: grant for name, grant in grants.items() if name not in donors}
        # Each claims what it takes before it waits for its engine: they come one after another to what there is.
        found = await asyncio.gather(
            *(self._grow(name, grant, decision, grace_s) for name, grant in recipients.items())
        )
        outcomes |= zip(recipients, found, strict=True)
        await self._roll_back(decision)
        for name in decision.rolled_back:
            outcomes[name] = Rejected(grants[name], f"engine {name}: rolled back, as a recipient could not grow")
        return outcomes

    def _note_restarts(self) -> None:
        """Raise the claims of ready engines to what their grants say: one may restart with a higher floor."""
        for name, engine in self._engines.items():
            if engine.stats().state is EngineState.READY and name not in self._late:
                self.ledger.record(name, max(self._held(name), self._bytes(name, self._now(name))))

    def _complaints(self, grants: Mapping[str, Grant]) -> dict[str, Rejected]:
        """Why a decision cannot be, for every grant of it; empty when it can."""
        reasons = {name: self._complaint(name, grant) for name, grant in grants.items()}
        rest: str | None = "another grant of the decision was rejected"
        if not any(reasons.values()):
            rest = self._beyond_budget(grants)
        if rest is None:
            return {}
        return {name: Rejected(grant, reasons[name] or rest) for name, grant in grants.items()}

    def _complaint(self, name: str, grant: Grant) -> str | None:
        if name not in self._engines:
            return f"there is no engine {name!r}; there are {', '.join(self._engines)}"
        engine, state = self._engines[name], self._engines[name].stats().state
        if state is not EngineState.READY:
            return f"engine {name} is {state}"
        if name in self._late:
            return f"engine {name} has not answered its last grant yet"
        return engine.limits.complaint(grant)

    def _beyond_budget(self, grants: Mapping[str, Grant]) -> str | None:
        """Why a decision as a whole cannot be: what its engines would hold, and the others once they have settled."""
        wanted = {name: w.grant for name, w in self._wanting.items()} | dict(grants)
        total = sum(
            self._held(name) if name in self._late else self._bytes(name, wanted.get(name) or self._now(name))
            for name in self._engines
        )
        grows = any(self._bytes(name, grant) > self._held(name) for name, grant in grants.items())
        if not grows or total <= self.ledger.budget_bytes:
            return None
        return f"the engines would hold {total} bytes; the budget is {self.ledger.budget_bytes}"

    def _bytes(self, name: str, grant: Grant) -> int:
        return self._engines[name].limits.held_bytes(grant.gpu_memory_utilization)

    async def _ask(self, name: str, grant: Grant, grace_s: float = 0) -> ResizeOutcome | None:
        """An engine's answer; None where it does not come in time. Its claim then stays at the most that it may
        hold."""
        asked = asyncio.ensure_future(self._engines[name].resize(grant, grace_s))
        done, _ = await asyncio.wait([asked], timeout=ANSWER_S)
        if done:
            return asked.result()
        self._late[name] = asyncio.create_task(self._answers_late(name, grant, asked), name=f"answer of {name}")
        return None

    async def _answers_late(self, name: str, grant: Grant, asked: "asyncio.Future[ResizeOutcome]") -> None:
        """It has answered after all, or was started again: now its claim can be what it holds."""
        outcome = await asked
        async with self._moving:
            del self._late[name]
            if isinstance(outcome, Deferred):
                self._defer(name, grant, outcome)
            else:
                self.ledger.claim(name, min(self._held(name), self._bytes(name, self._now(name))))
            await self._serve_waiting()

    def _no_answer(self, name: str, grant: Grant) -> Rejected:
        return Rejected(grant, f"engine {name} has not answered for {ANSWER_S:g} s; it is left alone until it has")

    def _held(self, name: str) -> int:
        return self.ledger.held[name]

    def _now(self, name: str) -> Grant:
        grant = self._engines[name].stats().grant
        assert grant is not None
        return grant

    def _supersede(self, name: str) -> None:
        wanting = self._wanting.pop(name, None)
        if wanting:
            wanting.settled.set_result(Superseded(wanting.grant))

    async def _shrink(self, name: str, grant: Grant, grace_s: float) -> ResizeOutcome:
        outcome = await self._ask(name, grant, grace_s)
        if isinstance(outcome, Applied):
            self.ledger.claim(name, self._bytes(name, grant))
        elif isinstance(outcome, Deferred):
            self._defer(name, grant, outcome)
        return outcome or self._no_answer(name, grant)

    def _defer(self, name: str, grant: Grant, deferred: Deferred) -> None:
        """What is free has been given back already; the rest follows when it is let go."""
        self.ledger.claim(name, min(self._held(name), self._bytes(name, grant) + deferred.held_bytes))
        self._settling.add(asyncio.create_task(self._let_go(name, deferred), name=f"shrink {name}"))

    async def _let_go(self, name: str, deferred: Deferred) -> None:
        """A deferred shrink ends: give up the claim, and let those grow who wait for it.

        Rejected means that the engine died: its memory is gone too, and it begins again with the grant.
        """
        outcome = await deferred.settled
        async with self._moving:
            self._settling.discard(cast("asyncio.Task[None]", asyncio.current_task()))
            # It may have been granted anew since; then this memory is the newer grant's business.
            if not isinstance(outcome, Superseded) and self._now(name) == deferred.grant:
                self.ledger.claim(name, self._bytes(name, deferred.grant))
            await self._serve_waiting()

    async def _grow(self, name: str, grant: Grant, decision: _Decision, grace_s: float) -> ResizeOutcome:
        """All of it where there is memory, else what there is, and the rest as it comes."""
        missing = self._bytes(name, grant) - self._held(name) - max(self.ledger.free, 0)
        if missing <= 0:
            return await self._grow_now(name, grant, decision)
        part = await self._grow_by_what_there_is(name, grant, decision)
        if isinstance(part, Rejected):
            return part
        if not self._settling:
            return part or self._not_released(name, grant)
        settled: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._wanting[name] = _Wanting(grant, decision, part, settled)
        return Deferred(grant, missing, grace_s, settled)

    def _not_released(self, name: str, grant: Grant) -> Rejected:
        return Rejected(grant, f"engine {name}: what its donors released does not go round; it keeps what it has")

    async def _grow_now(self, name: str, grant: Grant, decision: _Decision) -> Applied | Rejected:
        before, held = self._now(name), self._held(name)
        self.ledger.claim(name, self._bytes(name, grant))
        outcome = await self._ask(name, grant)
        if outcome is None:
            return self._no_answer(name, grant)
        if isinstance(outcome, Applied):
            return outcome
        assert isinstance(outcome, Rejected), outcome  # growing is never deferred
        self.ledger.claim(name, max(held, self._bytes(name, before)))
        decision.failed |= self._bytes(name, grant) > held
        return outcome

    async def _grow_by_what_there_is(self, name: str, grant: Grant, decision: _Decision) -> Applied | Rejected | None:
        nbytes = self._held(name) + max(self.ledger.free, 0)
        if nbytes < self._held(name) + _STEP_BYTES:
            return None
        share = nbytes / self._engines[name].limits.device_bytes
        part = Grant(share, grant.max_active_seqs, grant.max_step_tokens)
        return await self._grow_now(name, part, decision)

    async def _roll_back(self, decision: _Decision) -> None:
        """Where a recipient failed, its donors get back what is free of what they gave."""
        if not decision.failed:
            return
        for name, before in decision.before.items():
            nbytes = min(self._bytes(name, before), self._held(name) + max(self.ledger.free, 0))
            if nbytes <= self._held(name):
                continue
            share = nbytes / self._engines[name].limits.device_bytes
            self.ledger.claim(name, nbytes)
            back = Grant(min(share, before.gpu_memory_utilization), before.max_active_seqs, before.max_step_tokens)
            outcome = await self._ask(name, back)
            if isinstance(outcome, Applied):
                decision.rolled_back.add(name)
            elif outcome is not None:
                self.ledger.claim(name, self._bytes(name, self._now(name)))
        decision.before.clear()
        decision.failed = False

    async def _serve_waiting(self) -> None:
        """Memory was released: let those grow who wait for it, and tell them so when there is no more to come."""
        for name, wanting in list(self._wanting.items()):
            missing = self._bytes(name, wanting.grant) - self._held(name) - max(self.ledger.free, 0)
            if missing > 0:
                part = await self._grow_by_what_there_is(name, wanting.grant, wanting.decision)
                await self._roll_back(wanting.decision)
                if isinstance(part, Applied):
                    wanting.part = part
                if not isinstance(part, Rejected) and self._settling:
                    continue
                outcome: Settled = part or wanting.part or self._not_released(name, wanting.grant)
            else:
                outcome = await self._grow_now(name, wanting.grant, wanting.decision)
                await self._roll_back(wanting.decision)
            del self._wanting[name]
            wanting.settled.set_result(outcome)

    async def close(self) -> None:
        """Forget what is under way; whoever waits is told that it is superseded."""
        for name in list(self._wanting):
            self._supersede(name)
        under_way = [*self._settling, *self._late.values()]
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)
