"""An engine of the configuration as callers see it: one or more replicas that serve its requests.

Each request goes to one of them. If the replica dies during a reply, another one continues the
reply after the tokens that were already streamed; the caller notices a pause. A replica that cannot serve at the moment
holds its requests. A request that crashes replicas is refused (`quarantine`).
"""

import asyncio
import random
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial

from runtime.engines.handle import EngineHandle, EngineState, Recalled
from runtime.engines.quarantine import Call, Quarantine
from runtime.engines.reply_replay import ReplyReplay
from runtime.engines.request import Chunk, GenerateRequest
from runtime.errors import EngineDead, RequestQuarantined

LOOKED_AT = 8
"""How many replicas the choice for a request looks at."""
_LAST_RESORT = (EngineState.FAILED, EngineState.CLOSED, EngineState.ABSENT)


def replica_name(engine: str, device: str) -> str:
    """Return the name of an engine's replica on one of several devices. With one device it is the engine's name."""
    return f"{engine}@{device}"


def device_of(replica: str) -> str:
    """Return the name of a replica's device."""
    return replica.partition("@")[2] or "0"


def engine_of(replica: str) -> str:
    """Return the name of a replica's engine."""
    return replica.partition("@")[0]


class Replicas:
    """The replicas of one engine, which all generate the same reply to a greedy request.

    They must have started. Their owner closes them, which ends the requests that they serve. `choose` returns the
    replica for a request, given those that are ready. The default takes the one with the fewest requests.
    """

    def __init__(self, name: str, replicas: Sequence[EngineHandle]) -> None:
        self.name = name
        self.choose: Callable[[Sequence[EngineHandle]], EngineHandle] = _least_loaded
        self._replicas = tuple(replicas)
        self._quarantine = Quarantine()
        for replica in self._replicas:
            replica.on_death = partial(self._quarantine.died, replica)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request, from one replica after another until one of them completes it.

        Closing the generator early aborts the request. Raises RequestRefused if the engine refuses the request,
        RequestQuarantined if it is the likeliest cause of crashes, and EngineDead if all replicas have failed.
        """
        if not request.resumable and request.seed is None and request.temperature:
            request = replace(request, seed=secrets.randbits(31))  # a replay repeats a sampled reply only with a seed
        call, sends = Call(), 0
        lost: set[EngineHandle] = set()
        while True:
            replica = self._replica_for_next(lost)
            with _metered(replica, request):
                try:
                    async with self._quarantine.turn(call):
                        await self._until_ready(replica, lost)
                        if self._quarantine.must_wait(call):
                            continue
                        self._quarantine.sent(call, replica)
                        async with aclosing(self._rest_of_reply(replica, request, call, sends)) as chunks:
                            async for chunk in chunks:
                                self._quarantine.streamed(call, chunk)
                                yield chunk
                    return
                except Recalled:
                    sends += 1
                except EngineDead as error:
                    sends += 1
                    if call.poison:
                        raise RequestQuarantined(
                            f"engine {self.name} {call.poison}; this request is the likeliest cause, and is not sent "
                            "again"
                        ) from error
                    if len(lost) == len(self._replicas):
                        raise

    async def _until_ready(self, replica: EngineHandle, lost: set[EngineHandle]) -> None:
        """Wait until a replica serves requests. If it never will again, add it to `lost` and raise EngineDead."""
        try:
            await replica.until_ready()
        except EngineDead:
            lost.add(replica)
            raise

    @property
    def in_flight(self) -> int:
        """The number of requests that run or wait."""
        return sum(replica.usage.in_flight for replica in self._replicas)

    @property
    def running(self) -> int:
        """The number of requests that run."""
        return sum(replica.stats().running for replica in self._replicas)

    @property
    def serves(self) -> bool:
        """Whether any replica is ready."""
        return any(replica.is_ready for replica in self._replicas)

    def part(self, replica: str) -> float:
        """Return the part of the engine's requests that a replica will probably get, from 0 to 1.

        Replicas that are ready share them equally. If none is, the next request goes to one of the others.
        """
        ready = [each.name for each in self._replicas if each.is_ready]
        if not ready:
            return float(self._replica_for_next(()).name == replica)
        return 1 / len(ready) if replica in ready else 0.0

    def _replica_for_next(self, lost: Container[EngineHandle]) -> EngineHandle:
        """Return the replica for the next request: one that is ready, if any is.

        Of many replicas, look at a few random ones. The best of them is seldom much worse than the best of all
        (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
        """
        some = self._replicas if len(self._replicas) <= LOOKED_AT else random.sample(self._replicas, LOOKED_AT)
        ready = [replica for replica in some if replica.is_ready and replica not in lost]
        if ready:
            return self.choose(ready) if len(ready) > 1 else ready[0]

        def preference(replica: EngineHandle) -> tuple[bool, bool, int]:
            state = replica.stats().state
            return state in _LAST_RESORT, not replica.is_ready, replica.usage.in_flight

        return min([replica for replica in self._replicas if replica not in lost], key=preference)

    def _rest_of_reply(
        self, replica: EngineHandle, request: GenerateRequest, call: Call, sends: int
    ) -> AsyncGenerator[Chunk, None]:
        """Return a stream of the part of the reply that the caller does not have yet."""
        if sends:  # a new id tells the attempts apart in vLLM's logs and traces
            request = replace(request, request_id=f"{request.request_id}~{sends}")
        if not call.tokens:
            return replica.generate(request)
        if request.resumable:
            return replica.generate(replace(request, resume_tokens=tuple(call.tokens)))
        return self._replay(replica, request, ReplyReplay(self.name, call.tokens, call.characters))

    async def _replay(
        self, replica: EngineHandle, request: GenerateRequest, replay: ReplyReplay
    ) -> AsyncGenerator[Chunk, None]:
        """Generate a reply again from its beginning, and stream what the caller does not have of it."""
        async with aclosing(replica.generate(request)) as chunks:
            async for chunk in chunks:
                if (new_part := replay.new_part(chunk)) is not None:
                    yield new_part


def _least_loaded(ready: Sequence[EngineHandle]) -> EngineHandle:
    return min(ready, key=lambda replica: replica.usage.in_flight)


def gathered(engines: Mapping[str, EngineHandle]) -> dict[str, Replicas]:
    """Return the replicas of each engine, given all of them by name."""
    replicas_of: defaultdict[str, list[EngineHandle]] = defaultdict(list)
    for name, engine in engines.items():
        replicas_of[engine_of(name)].append(engine)
    return {engine: Replicas(engine, each) for engine, each in replicas_of.items()}


@contextmanager
def _metered(replica: EngineHandle, request: GenerateRequest) -> Iterator[None]:
    """Count a request of a replica, and charge it for its part of the replica's memory and time."""
    with replica.usage.request(request.rank(asyncio.get_running_loop().time())):
        charged_before = replica.usage.charged()
        try:
            yield
        finally:
            request.account.add(replica.usage.charged() - charged_before, replica.limits.device_bytes)
