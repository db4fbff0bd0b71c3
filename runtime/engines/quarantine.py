"""Find the request that crashes its engine, refuse it, and serve the others.

Owns the suspicion against the requests of one engine, over the engine's restarts:

- A request that breaks an engine mostly does so before its first token. So the suspects of a crash are the requests
  that the engine had and had streamed nothing of; if there are none, all that it had.
- A request that was alone in the engine when it crashed is poison. It is not sent again.
- Several suspects are sent again one at a time, each after the one before has its first token. Requests that are new
  wait in the same line. So the next crash has one suspect that was a suspect before, and that one is poison. A suspect
  that broke an engine after its first token keeps its turn to its end.
- A death that came from outside, as by the kernel's OOM killer or an operator, says little about the requests. It makes
  a request poison only at the third time.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from runtime.engines.request import Chunk
from runtime.errors import Death

KILLS = 3
"""A request is poison if it was the only suspect when so many engines in a row were killed under it."""
TURN_S = 10.0
"""A turn lasts so many seconds at most, counted from the moment when the engine has the request."""


@dataclass(eq=False)
class Call:
    """One request, and what is known of it.

    `tokens` and `characters` are what was streamed of its reply. `crashes` (hangs count too) and `kills` are the
    engines that ended while it was a suspect. `answered` says that the engine which has it now has streamed something,
    `suspected` that it has not been served since it became a suspect, `late` that it may break an engine after its
    first token, and `poison` how the engine ended that it is to blame for.
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
    """The requests of one engine. To be used on the event loop alone."""

    def __init__(self) -> None:
        self.waiting = 0
        """Requests in the line."""
        self._sent: set[Call] = set()
        self._suspects: set[Call] = set()
        self._line = asyncio.Lock()
        self._turn: Call | None = None
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self, call: Call) -> AsyncIterator[None]:
        """Wait for the call's turn. While there are suspects, requests are sent one at a time."""
        try:
            if call.suspected:
                self._suspects.add(call)
            if self._suspects:
                await self._queue(call)
            yield
        finally:
            self._sent.discard(call)
            self._suspects.discard(call)
            self._end_turn(call)

    async def _queue(self, call: Call) -> None:
        self.waiting += 1
        try:
            await self._line.acquire()
        finally:
            self.waiting -= 1
        self._turn = call
        if not self._suspects:
            self._end_turn(call)

    def must_wait(self, call: Call) -> bool:
        """Return True if suspects appeared after the call was let through."""
        return bool(self._suspects) and self._turn is not call

    def sent(self, call: Call) -> None:
        """Note that the engine has the call from now on, until its turn is left or the engine dies."""
        call.answered = False
        self._sent.add(call)
        if self._turn is call:
            # A reader that stops reading, or an engine that admits nothing now, must not hold up the others for ever.
            self._timer = asyncio.get_running_loop().call_later(TURN_S, self._end_turn, call)

    def streamed(self, call: Call, chunk: Chunk) -> None:
        """Note a piece of the reply. After the first one the next in the line is sent."""
        call.tokens += chunk.token_ids
        call.characters += len(chunk.text)
        call.answered = True
        if not call.late:
            call.suspected = False
            self._end_turn(call)

    def died(self, death: Death) -> None:
        """Judge the calls that the engine had when it died."""
        unanswered = {call for call in self._sent if not call.answered}
        if death is Death.KILLED:
            self._killed(unanswered)
        else:
            self._crashed(unanswered or set(self._sent), death)
        self._sent.clear()

    def _killed(self, suspects: set[Call]) -> None:
        for call in suspects:
            call.kills += 1
            call.suspected |= call.kills > 1
            if call.kills >= KILLS and len(suspects) == 1:
                call.poison = Death.KILLED

    def _crashed(self, suspects: set[Call], death: Death) -> None:
        most = max((call.crashes for call in suspects), default=0)
        likeliest = [call for call in suspects if call.crashes == most]
        for call in suspects:
            call.crashes += 1
            call.suspected = True
            call.late = call.answered and call.crashes > 1
        enough = 1 if len(self._sent) == 1 and death is Death.CRASHED else 2
        if len(likeliest) == 1 and likeliest[0].crashes >= enough:
            likeliest[0].poison = death

    def _end_turn(self, call: Call) -> None:
        if self._turn is call:
            self._turn = None
            self._suspects.discard(call)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._line.release()
