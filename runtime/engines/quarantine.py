"""Finds the request that ends its engine, so that it ends no second one, and the requests beside it are served.

Owns the suspicion against the requests of one engine, over the engine's restarts:

- A request that breaks an engine mostly does so before its first token. So the suspects of a death are the requests
  that the engine had and had streamed nothing of; if there are none, all that it had.
- A request that was the only suspect when its engine crashed is poison. It is not sent again.
- Several suspects are sent again one at a time, each after the one before has its first token. Requests that are new
  wait in the same line, so that the next crash has one suspect. A request that broke an engine after its first token
  keeps its turn to its end the second time.
- A death that came from outside, as by the kernel's OOM killer or an operator, says little about the requests. It
  counts only if it meets the same ones again and again.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from runtime.engines.base import Chunk
from runtime.errors import Death

DEATHS: Mapping[Death, int] = {Death.CRASHED: 1, Death.HUNG: 2, Death.KILLED: 3}
"""A request that is the only suspect of a death is poison once so many engines have died under it."""


@dataclass(eq=False)
class Call:
    """One request, and what is known of it.

    `tokens` and `characters` are what was streamed of its reply, `deaths` the engines that died while it was a suspect.
    `answered` says that the engine which has it now has streamed something, `late` that it may break an engine long
    after its first token, `poison` how its engine died if the call is to blame.
    """

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    deaths: int = 0
    answered: bool = False
    late: bool = False
    poison: Death | None = None


class Quarantine:
    """The requests of one engine. To be used on the event loop alone."""

    def __init__(self) -> None:
        self._sent: set[Call] = set()
        self._suspects: set[Call] = set()
        self._line = asyncio.Lock()
        self._turn: Call | None = None

    @contextmanager
    def request(self) -> Iterator[Call]:
        """Keep track of a request from its arrival to its end, over all engines that it is sent to."""
        call = Call()
        try:
            yield call
        finally:
            self._suspects.discard(call)

    @asynccontextmanager
    async def turn(self, call: Call) -> AsyncIterator[None]:
        """Wait until the call may be sent to the engine: at once, unless there are suspects."""
        if self._suspects:
            await self._line.acquire()
            self._turn = call
            if not self._suspects:
                self._end_turn(call)
        try:
            yield
        finally:
            self._sent.discard(call)
            self._end_turn(call)

    def sent(self, call: Call) -> None:
        """Note that the engine has the call from now on, until its turn is left or the engine dies."""
        call.answered = False
        self._sent.add(call)

    def streamed(self, call: Call, chunk: Chunk) -> None:
        """Note a piece of the reply. The first one lets the next in the line go ahead."""
        call.tokens += chunk.token_ids
        call.characters += len(chunk.text)
        if not call.answered:
            call.answered = True
            if self._turn is call and not call.late:
                self._suspects.discard(call)
                self._end_turn(call)

    def died(self, death: Death) -> None:
        """Judge the calls that the engine had when it died."""
        suspects = {call for call in self._sent if not call.answered}
        if not suspects and death is not Death.KILLED:
            suspects = set(self._sent)
        most = max((call.deaths for call in suspects), default=0)
        likeliest = [call for call in suspects if call.deaths == most]
        for call in suspects:
            call.deaths += 1
            call.late = call.answered and call.deaths > 1
        if len(likeliest) == 1 and likeliest[0].deaths >= DEATHS[death]:
            likeliest[0].poison = death
        self._suspects |= {call for call in suspects if death is not Death.KILLED or call.deaths > 1}
        self._sent.clear()

    def _end_turn(self, call: Call) -> None:
        if self._turn is call:
            self._turn = None
            self._line.release()
