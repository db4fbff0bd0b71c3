"""Finds the request that crashes its engine, so that it can be refused while the others are served.

- *Poison* is a request that ends its engine whenever it is sent.
- A *suspect* is a request that may be poison, and has to be sent alone before it is sent with others.
- To *convict* a request is to decide that it is poison. It is refused and not sent again.

The quarantine keeps what counts against the requests of one engine over the restarts of all of its replicas. It
convicts only a request that was alone in a replica when the replica died. When several are in flight, any of them can
be the cause, whether or not it has streamed something, or none: a GPU fails too.

- The death of a replica counts against every request in flight there. Its first kill does not count against a request:
  the kernel's OOM killer, an operator or the loss of a node often ends an engine for other reasons.
- A request whose caller has left may still run in the engine, for example in a step that hangs. It counts as in flight
  until a request that was sent there later has generated a token.
- A request that was alone is convicted at its first crash, its second hang or its fourth kill (DEATHS_TO_CONVICT). The
  deaths that it was in flight at no longer count against the others, nor against the replicas.
- Suspects are sent alone, one after the other, and all other requests wait for them:

| deaths that count | which requests are suspects | what is generated alone |
|---|---|---|
| 1 | those that had streamed nothing | 2 tokens, as a test |
| 2 | all | `stream_interval` + 64 tokens after those that were streamed, as a test |
| 3 and more | all | the reply |

So poison is found at its second crash if it crashes before its first token, and at its third if it crashes later. The
tokens of a test are discarded.

A suspect keeps others out for ALONE_S at most, and for UNREAD_S at most after its caller has stopped reading. They
wait for requests that are no suspects for OTHERS_S at most after these were sent. So after each death, N suspects
delay other requests by at most N * ALONE_S + OTHERS_S, besides restarts. A death after the time alone counts against
all requests in flight, and convicts none. Poison that is resumed after what was streamed then crashes within its next
time alone. If poison cannot be resumed and takes longer than ALONE_S to crash, it is not found, and uses up the
engine's restarts.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from runtime.engines.handle import EngineHandle, EngineState, Recalled
from runtime.engines.request import Chunk
from runtime.errors import Death, RequestRefused

DEATHS_TO_CONVICT = {Death.CRASHED: 1, Death.HUNG: 2, Death.KILLED: 4}
"""A request is convicted if it was alone in a replica when it died, and this many such deaths count against it."""
ALONE_S = 80.0
"""The longest time, in seconds, that a suspect keeps others out. It exceeds `Patience.hang_s` + `pulse_every_s`."""
UNREAD_S = 2.0
"""After this many seconds without a read by its caller, a suspect no longer keeps others out."""
OTHERS_S = 40.0
"""This many seconds after a request was sent, suspects no longer wait for it to leave their replica."""
IN_TRANSIT_TOKENS = 64
"""The length of a test is `stream_interval` + this: the most tokens that an engine has generated and not streamed."""


@dataclass(frozen=True, eq=False)
class Incident:
    """The death of a replica, and the calls that were in flight there.

    `noted` is False if the replica was lost with its node. Then its agent has not counted the death.
    """

    replica: EngineHandle
    noted: bool
    death: Death
    calls: frozenset["Call"]


@dataclass(eq=False)
class Call:
    """One request and what is known about it.

    - `tokens`, `characters`: the token ids, and the length of the text, that were streamed of its reply.
    - `incidents`: the deaths of replicas that had it, without those that another request was convicted of.
    - `answered`: the replica that has it now has streamed something of its reply.
    - `untested`: it has to be tested alone before it is sent with others.
    - `alone_until_s`: until when it keeps suspects out of its replica, on the event loop's clock.
    - `number`: its place in the order in which calls were sent, and callers left.
    - `convicted_of`: how the engine ended, if the request was convicted of that, or None.
    """

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    incidents: list[Incident] = field(default_factory=list)
    answered: bool = False
    untested: bool = False
    alone_until_s: float = 0.0
    number: int = 0
    convicted_of: Death | None = None

    def count(self, death: Death) -> int:
        """Return how many deaths of a kind it was in flight at."""
        return sum(incident.death is death for incident in self.incidents)

    @property
    def suspicion(self) -> int:
        """Return how many deaths count against it."""
        return len(self.incidents) - min(self.count(Death.KILLED), 1)

    @property
    def needs_test(self) -> bool:
        """True if it has to be tested after the latest of its deaths."""
        return self.suspicion == 2 or (self.suspicion == 1 and not self.answered)

    @property
    def suspected(self) -> bool:
        """True if it has to be sent alone."""
        return self.untested or self.suspicion > 2

    def test_tokens(self, stream_interval: int) -> int:
        """Return how many tokens its test has to generate. An error in the step of the first can show in the second."""
        return 2 if self.suspicion < 2 else stream_interval + IN_TRANSIT_TOKENS


class Quarantine:
    """The suspects among the requests of one engine. Use it on the event loop only."""

    def __init__(self) -> None:
        self._sent: defaultdict[EngineHandle, set[Call]] = defaultdict(set)
        # The calls whose callers have left a replica, the first first, and when they left in the order of numbers.
        self._left: defaultdict[EngineHandle, dict[Call, int]] = defaultdict(dict)
        self._numbers = count()
        self._removed = asyncio.Event()
        self._suspects: set[Call] = set()
        self._no_suspects = asyncio.Event()
        self._no_suspects.set()
        self._line = asyncio.Lock()
        self._alone: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def cleared(self, call: Call) -> AsyncIterator[None]:
        """Wait until the call may be sent. Suspects are sent one at a time, and before all others."""
        try:
            if call.suspected:
                await self._wait_in_line(call)
            while self.must_wait(call):
                await self._no_suspects.wait()
            yield
        except (Recalled, RequestRefused):
            self.ended(call)  # the replica does not run it
            raise
        finally:
            for replica, calls in self._sent.items():
                if call in calls:
                    self._left[replica][call] = next(self._numbers)
            self.ended(call)

    async def _wait_in_line(self, call: Call) -> None:
        self._suspects.add(call)
        self._no_suspects.clear()
        await self._line.acquire()
        self._alone = call
        if not call.suspected:  # another one has been convicted meanwhile
            self._end_alone(call)

    def must_wait(self, call: Call) -> bool:
        """Return True if suspects have appeared since the call was let through."""
        return bool(self._suspects) and self._alone is not call

    async def until_alone(self, call: Call, replica: EngineHandle) -> None:
        """Wait until a suspect's replica is empty, or no request in it keeps suspects out any more."""
        others = self._sent[replica]
        if self._alone is not call or not others:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(other.alone_until_s for other in others)):
                while others:
                    self._removed.clear()
                    await self._removed.wait()

    def sent(self, call: Call, replica: EngineHandle) -> None:
        """Note that a replica has the call from now on, until it has ended or the replica dies."""
        alone = self._alone is call
        call.answered = False
        call.number = next(self._numbers)
        call.alone_until_s = asyncio.get_running_loop().time() + (ALONE_S if alone else OTHERS_S)
        self._sent[replica].add(call)
        if alone:
            self._end_alone_at(call, call.alone_until_s)

    def answered(self, call: Call, replica: EngineHandle) -> None:
        """Note that a replica has generated something for the call, so what it had aborted before is over."""
        call.answered = True
        left = self._left[replica]
        while left and left[first := next(iter(left))] < call.number:
            del left[first]

    def streamed(self, call: Call, replica: EngineHandle, chunk: Chunk) -> None:
        """Note a chunk that the caller is about to get. Call `read` when the caller asks for the next one."""
        self.answered(call, replica)
        call.tokens += chunk.token_ids
        call.characters += len(chunk.text)
        if chunk.finish is not None:
            self.ended(call)
        elif self._alone is call:
            self._end_alone_at(call, min(call.alone_until_s, asyncio.get_running_loop().time() + UNREAD_S))

    def read(self, call: Call) -> None:
        """Note that the caller waits for the next chunk."""
        if self._alone is call:
            self._end_alone_at(call, call.alone_until_s)

    def ended(self, call: Call) -> None:
        """Note that the reply, or the test, of a call is complete."""
        for calls in self._sent.values():
            calls.discard(call)
        self._removed.set()
        self._end_alone(call)

    def died(self, replica: EngineHandle, death: Death) -> None:
        """Judge the calls that a replica had when it died."""
        sent, left = frozenset(self._sent[replica]), frozenset(self._left[replica])
        self._sent[replica].clear()
        self._left[replica].clear()
        self._removed.set()
        incident = Incident(replica, replica.state is not EngineState.LOST, death, sent | left)
        for call in incident.calls:
            call.incidents.append(incident)
            call.untested = call.needs_test
        if sent and len(incident.calls) == 1:
            (alone,) = sent
            if alone.count(death) >= DEATHS_TO_CONVICT[death]:
                self._convict(alone, death)

    def _convict(self, call: Call, death: Death) -> None:
        call.convicted_of = death
        for incident in call.incidents:
            if incident.noted:
                incident.replica.excuse_death()
            for other in incident.calls - {call}:
                other.incidents.remove(incident)
                other.untested = other.untested and other.needs_test

    def _end_alone_at(self, call: Call, time_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(time_s, self._end_alone, call)

    def _end_alone(self, call: Call) -> None:
        self._suspects.discard(call)
        if not self._suspects:
            self._no_suspects.set()
        if self._alone is call:
            call.alone_until_s = 0.0
            self._alone = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._line.release()
