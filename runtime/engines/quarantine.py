"""Finds the request that crashes its engine, so that it can be refused while the others are served.

It keeps the suspicions against the requests of one engine over the restarts of all of the engine's replicas. Only a
request that was alone in a replica is convicted of the replica's death. When several are in flight, any of them can be
the cause, whether or not it has streamed something, or none: a GPU fails too.

- The death of a replica counts against every request in flight there. Its first kill does not count against a request:
  the kernel's OOM killer, an operator or the loss of a node often ends an engine for other reasons.
- A request that was alone is poison at its first crash, its second hang or its fourth kill (DEATHS_TO_CONVICT). It is
  refused and not sent again. The deaths that it was in flight at no longer count against the others, nor against the
  replicas.
- Suspects are sent alone, one after the other, and all other requests wait for them:

| deaths that count | who is suspected | what is generated alone |
|---|---|---|
| 1 | a request that had streamed nothing | one token, as a test |
| 2 | every request | what a dying engine can have generated beyond what was streamed, as a test |
| 3 and more | every request | the reply |

So poison is found at its second crash if it crashes before its first token, and at its third if it crashes later. The
tokens of a test are discarded. After TURN_S, and after twice as long for each death that counts, a request no longer
keeps others out of its replica. A crash then proves nothing, but the next turn is longer.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from runtime.engines.handle import EngineHandle
from runtime.engines.request import Chunk
from runtime.errors import Death

DEATHS_TO_CONVICT = {Death.CRASHED: 1, Death.HUNG: 2, Death.KILLED: 4}
"""A request is poison if it was alone in a replica when it died, and this many such deaths count against it."""
TURN_S = 40.0
"""Half the longest turn of a suspect that one death counts against, in seconds. A hang is noticed within that turn."""
IN_TRANSIT_TOKENS = 64
"""More tokens than are lost on their way from an engine that dies."""


@dataclass(frozen=True, eq=False)
class Incident:
    """The death of a replica, and the calls that were in flight there."""

    replica: EngineHandle
    death: Death
    calls: frozenset["Call"]


@dataclass(eq=False)
class Call:
    """One request and what is known about it.

    - `tokens`, `characters`: the token ids, and the length of the text, that were streamed of its reply.
    - `incidents`: the deaths of replicas that had it, without those that another request was convicted of.
    - `answered`: the replica that has it now has streamed something of its reply.
    - `untested`: it has to be tested alone before it is sent with others.
    - `turn_ends_s`: until when it keeps suspects out of its replica, on the event loop's clock.
    - `poison`: how the engine ended that it is blamed for, or None.
    """

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    incidents: list[Incident] = field(default_factory=list)
    answered: bool = False
    untested: bool = False
    turn_ends_s: float = 0.0
    poison: Death | None = None

    def count(self, death: Death) -> int:
        """Return how many deaths of a kind it was in flight at."""
        return sum(incident.death is death for incident in self.incidents)

    @property
    def suspicion(self) -> int:
        """How many deaths count against it."""
        return len(self.incidents) - min(self.count(Death.KILLED), 1)

    @property
    def suspected(self) -> bool:
        """True if it has to be sent alone."""
        return self.untested or self.suspicion > 2

    def test_tokens(self, stream_interval: int) -> int:
        """Return how many tokens its test has to generate."""
        return 1 if self.suspicion < 2 else stream_interval + IN_TRANSIT_TOKENS


class Quarantine:
    """The suspicions against the requests of one engine. Use it on the event loop only."""

    def __init__(self) -> None:
        self._sent: defaultdict[EngineHandle, set[Call]] = defaultdict(set)
        self._left = asyncio.Event()
        self._suspects: set[Call] = set()
        self._no_suspects = asyncio.Event()
        self._no_suspects.set()
        self._line = asyncio.Lock()
        self._turn: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, call: Call) -> AsyncIterator[None]:
        """Wait until the call may be sent. Suspects are sent one at a time, and before all others."""
        try:
            if call.suspected:
                await self._wait_in_line(call)
            while self.must_wait(call):
                await self._no_suspects.wait()
            yield
        finally:
            for calls in self._sent.values():
                calls.discard(call)
            self._left.set()
            self._end_turn(call)

    async def _wait_in_line(self, call: Call) -> None:
        self._suspects.add(call)
        self._no_suspects.clear()
        await self._line.acquire()
        self._turn = call
        if not call.suspected:  # another one has been convicted meanwhile
            self._end_turn(call)

    def must_wait(self, call: Call) -> bool:
        """Return True if suspects have appeared since the call was let through."""
        return bool(self._suspects) and self._turn is not call

    async def until_alone(self, call: Call, replica: EngineHandle) -> None:
        """Wait until a suspect's replica is empty, or the turns of all requests in it are over."""
        others = self._sent[replica]
        if self._turn is not call or not others:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(other.turn_ends_s for other in others)):
                while others:
                    self._left.clear()
                    await self._left.wait()

    def sent(self, call: Call, replica: EngineHandle) -> None:
        """Note that a replica has the call from now on, until its turn ends or the replica dies."""
        loop = asyncio.get_running_loop()
        call.answered = False
        call.turn_ends_s = loop.time() + TURN_S * 2**call.suspicion
        self._sent[replica].add(call)
        if self._turn is call:
            # A reader that stops reading, or an engine that admits nothing, must not block the line for ever.
            self._timer = loop.call_at(call.turn_ends_s, self._end_turn, call)

    def streamed(self, call: Call, chunk: Chunk) -> None:
        """Note a chunk of the reply."""
        call.tokens += chunk.token_ids
        call.characters += len(chunk.text)
        call.answered = True

    def died(self, replica: EngineHandle, death: Death) -> None:
        """Judge the calls that a replica had when it died."""
        calls = frozenset(self._sent[replica])
        self._sent[replica].clear()
        self._left.set()
        incident = Incident(replica, death, calls)
        for call in calls:
            call.incidents.append(incident)
            call.untested = call.suspicion == 2 or (call.suspicion == 1 and not call.answered)
        if len(calls) == 1:
            (alone,) = calls
            if alone.count(death) >= DEATHS_TO_CONVICT[death]:
                self._convict(alone, death)

    def _convict(self, call: Call, death: Death) -> None:
        call.poison = death
        for incident in call.incidents:
            incident.replica.excuse_death()
            for other in incident.calls - {call}:
                other.incidents.remove(incident)

    def _end_turn(self, call: Call) -> None:
        self._suspects.discard(call)
        if not self._suspects:
            self._no_suspects.set()
        if self._turn is call:
            self._turn = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._line.release()
