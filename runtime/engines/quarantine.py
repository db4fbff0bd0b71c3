"""Finds the request that crashes its engine, so that it can be refused while the others are served.

It keeps the suspicions against the requests of one engine over the restarts of all of the engine's replicas:

- A request that crashes an engine usually does so before its first token. The suspects of a crash are therefore the
  requests in the replica that had streamed nothing yet, or all requests in it if each had streamed something.
- A request that was alone in the replica when it crashed is poison: it is refused and not sent again.
- If there are several suspects, they are sent again one at a time, each after the previous one has its first token. New
  requests wait in the same line. The next crash then has only one suspect that was suspected before, and that one is
  poison. A suspect that crashed an engine after its first token keeps its turn until its reply ends.
- A death from outside, by the kernel's OOM killer or an operator, says little about the requests. It makes a request
  poison only the third time.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from runtime.engines.request import Chunk
from runtime.errors import Death

KILLS = 3
"""A request is poison if this many engines were killed while it was a suspect, the last time as the only one."""
TURN_S = 10.0
"""The longest turn, in seconds after a replica has received the request."""


@dataclass(eq=False)
class Call:
    """One request and what is known about it.

    - `tokens`, `characters`: the token ids, and the length of the text, that were streamed of its reply.
    - `crashes`, `kills`: how many engines crashed (or hung), and how many were killed, while it was a suspect.
    - `answered`: the engine that has it now has streamed something of its reply.
    - `suspected`: it became a suspect and has not been served since.
    - `late`: it may crash an engine after its first token.
    - `poison`: how the engine ended that it is blamed for, or None.
    """

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    crashes: int = 0
    kills: int = 0
    answered: bool = False
    suspected: bool = False
    late: bool = False
    poison: Death | None = None


class Quarantine:
    """The suspicions against the requests of one engine. Use it on the event loop only."""

    def __init__(self) -> None:
        self._sent: defaultdict[Hashable, set[Call]] = defaultdict(set)
        self._suspects: set[Call] = set()
        self._line = asyncio.Lock()
        self._turn: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, call: Call) -> AsyncIterator[None]:
        """Wait until the call may be sent. While there are suspects, calls are sent one at a time."""
        try:
            if call.suspected:
                self._suspects.add(call)
            if self._suspects:
                await self._wait_in_line(call)
            yield
        finally:
            for calls in self._sent.values():
                calls.discard(call)
            self._suspects.discard(call)
            self._end_turn(call)

    async def _wait_in_line(self, call: Call) -> None:
        await self._line.acquire()
        self._turn = call
        if not self._suspects:
            self._end_turn(call)

    def must_wait(self, call: Call) -> bool:
        """Return True if suspects have appeared since the call was let through."""
        return bool(self._suspects) and self._turn is not call

    def sent(self, call: Call, replica: Hashable) -> None:
        """Note that a replica has the call from now on, until its turn ends or the replica dies."""
        call.answered = False
        self._sent[replica].add(call)
        if self._turn is call:
            # A reader that stops reading, or an engine that admits nothing, must not block the line for ever.
            self._timer = asyncio.get_running_loop().call_later(TURN_S, self._end_turn, call)

    def streamed(self, call: Call, chunk: Chunk) -> None:
        """Note a chunk of the reply. After the first one the next call in the line is sent."""
        call.tokens += chunk.token_ids
        call.characters += len(chunk.text)
        call.answered = True
        if not call.late:
            call.suspected = False
            self._end_turn(call)

    def died(self, replica: Hashable, death: Death) -> None:
        """Judge the calls that a replica had when it died."""
        sent = self._sent.pop(replica, set())
        unanswered = {call for call in sent if not call.answered}
        if death is Death.KILLED:
            self._judge_kill(unanswered)
        else:
            self._judge_crash(unanswered or sent, len(sent) == 1, death)

    def _judge_kill(self, suspects: set[Call]) -> None:
        for call in suspects:
            call.kills += 1
            call.suspected |= call.kills > 1
            if call.kills >= KILLS and len(suspects) == 1:
                call.poison = Death.KILLED

    def _judge_crash(self, suspects: set[Call], alone: bool, death: Death) -> None:
        most_crashes = max((call.crashes for call in suspects), default=0)
        likeliest = [call for call in suspects if call.crashes == most_crashes]
        for call in suspects:
            call.crashes += 1
            call.suspected = True
            call.late = call.answered and call.crashes > 1
        crashes_to_convict = 1 if alone and death is Death.CRASHED else 2
        if len(likeliest) == 1 and likeliest[0].crashes >= crashes_to_convict:
            likeliest[0].poison = death

    def _end_turn(self, call: Call) -> None:
        if self._turn is call:
            self._turn = None
            self._suspects.discard(call)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._line.release()
