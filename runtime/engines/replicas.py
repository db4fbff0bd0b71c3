"""An engine of the configuration as callers see it: one or more replicas that serve its requests.

Each request goes to one of them. If the replica dies during a reply, another one continues the reply after the tokens
that were already streamed; the caller notices a pause. While no replica is ready, requests wait for the first one that
will be. A request that crashes replicas is refused (`quarantine`).
"""

import asyncio
import random
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from runtime.engines.handle import EngineHandle, EngineState, Recalled
from runtime.engines.quarantine import Call, Quarantine
from runtime.engines.reply_replay import ReplyReplay
from runtime.engines.request import Chunk, GenerateRequest
from runtime.errors import EngineDead, RequestQuarantined, RequestRefused

LOOKED_AT = 8
"""The most replicas that the choice for a request looks at."""
LOOK_AGAIN_S = 1.0
"""Seconds between two looks of a waiting request for new replicas."""


SESSIONS_KEPT = 10_000
"""The most sessions of which an engine remembers the replica."""


@dataclass(frozen=True)
class Home:
    """The replica that served the latest request of a session, and how many tokens its prompt had."""

    replica: EngineHandle
    prompt_tokens: int


Choose = Callable[[Sequence[EngineHandle], Home | None], EngineHandle]
"""Chooses one of the replicas that are ready, given where the request's session is at home."""


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
    replica for a request. The default takes the one with the fewest requests. If the
    placement starts a replica when none is left, `restored` is True, and requests wait for that.
    """

    def __init__(self, name: str, replicas: Sequence[EngineHandle], restored: bool = False) -> None:
        self.name = name
        self.restored = restored
        self.choose: Choose = _least_loaded
        self._homes: OrderedDict[str, Home] = OrderedDict()
        self._replicas: tuple[EngineHandle, ...] = ()
        self._quarantine = Quarantine()
        for replica in replicas:
            self.add(replica)

    def add(self, replica: EngineHandle) -> None:
        """Send requests to this replica, too."""
        self._replicas += (replica,)
        replica.on_death = partial(self._quarantine.died, replica)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request, from one replica after another until one of them completes it.

        Closing the generator early aborts the request. Raises RequestRefused if the engine refuses the request,
        RequestQuarantined if the quarantine convicts it of crashes, and EngineDead if all replicas have failed.
        """
        if not request.resumable and request.seed is None and request.temperature:
            request = replace(request, seed=secrets.randbits(31))  # a replay repeats a sampled reply only with a seed
        call, sends = Call(), 0
        failed: set[EngineHandle] = set()
        with _Meter(request) as meter:
            while True:
                meter.at(self._replica_for_next(failed, request.session))
                try:
                    async with self._quarantine.cleared(call):
                        replica = await self._ready_replica(meter, failed, request.session)
                        await self._quarantine.until_alone(call, replica)
                        if self._quarantine.must_wait(call) or not replica.is_ready:
                            continue
                        self._quarantine.sent(call, replica)
                        if call.untested:
                            await self._test(replica, request, call, sends)
                            sends += 1
                            continue
                        async with aclosing(self._rest_of_reply(replica, request, call, sends)) as chunks:
                            async for chunk in chunks:
                                if not call.tokens:
                                    self._remember(request.session, replica, chunk.prompt_tokens)
                                self._quarantine.streamed(call, replica, chunk)
                                replica.usage.answered += chunk.finish is not None
                                yield chunk
                                self._quarantine.read(call)
                    return
                except Recalled:
                    sends += 1
                except EngineDead as error:
                    sends += 1
                    if call.convicted_of:
                        raise RequestQuarantined(
                            f"engine {self.name} {call.convicted_of} while it had only this request; the request is "
                            "not sent again"
                        ) from error
                    if not self._may_serve(failed):
                        raise

    def _remember(self, session: str | None, replica: EngineHandle, prompt_tokens: int) -> None:
        if session is not None and len(self._replicas) > 1:
            self._homes[session] = Home(replica, prompt_tokens)
            self._homes.move_to_end(session)
            if len(self._homes) > SESSIONS_KEPT:
                self._homes.popitem(last=False)

    async def _ready_replica(self, meter: "_Meter", failed: set[EngineHandle], session: str | None) -> EngineHandle:
        """Return a replica that is ready. If none is, wait for the first that will be.

        Meanwhile, the request counts at one of them, which wakes if it sleeps. Raises EngineDead if all have failed.
        """
        waiting: dict[asyncio.Task[None], EngineHandle] = {}
        try:
            while True:
                replica = self._replica_for_next(failed, session)
                meter.at(replica)
                if replica.is_ready:
                    return replica
                await self._wait_for_any(waiting, failed)
                while _can_serve(replica, failed) and replica.state is not EngineState.LOST and not self.serves:
                    await self._wait_for_any(waiting, failed)
        finally:
            for task in waiting:
                task.cancel()

    async def _wait_for_any(self, waiting: "dict[asyncio.Task[None], EngineHandle]", failed: set[EngineHandle]) -> None:
        """Wait for a while until a replica is ready. Add those to `failed` that never will be.

        `waiting` has the tasks that wait for replicas; it is kept from one call to the next. Raises EngineDead if no
        replica is left.
        """
        for replica in self._replicas:
            if _can_serve(replica, failed) and replica not in waiting.values():
                waiting[asyncio.ensure_future(replica.until_ready())] = replica
        if not waiting:
            await asyncio.sleep(LOOK_AGAIN_S)
            return
        done, _ = await asyncio.wait(waiting, timeout=LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            replica = waiting.pop(task)
            if task.exception() is not None:
                if replica.state is not EngineState.ABSENT:  # it may come back
                    failed.add(replica)
                if not self._may_serve(failed):
                    task.result()  # raises

    def _may_serve(self, failed: Container[EngineHandle]) -> bool:
        """Return True if any replica can serve a request now or later."""
        return any(_can_serve(each, failed) or (self.restored and each not in failed) for each in self._replicas)

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
        """Return True if any replica is ready."""
        return any(replica.is_ready for replica in self._replicas)

    def part(self, replica: str) -> float:
        """Return the part of the engine's requests that a replica will probably get, from 0 to 1.

        Replicas that are ready share them equally. If none is, the next request goes to one of the others.
        """
        ready = [each.name for each in self._replicas if each.is_ready]
        if not ready:
            left = any(_can_serve(each, ()) for each in self._replicas)
            return float(left and self._replica_for_next(()).name == replica)
        return 1 / len(ready) if replica in ready else 0.0

    def _replica_for_next(self, failed: Container[EngineHandle], session: str | None = None) -> EngineHandle:
        """Return the replica for the next request: one that is ready, if any is. Raise EngineDead if none can serve.

        Of many replicas, look at a few random ones. The best of them is seldom much worse than the best of all
        (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
        """
        some = self._replicas if len(self._replicas) <= LOOKED_AT else random.sample(self._replicas, LOOKED_AT)
        home = self._homes.get(session) if session is not None else None
        if home is not None and home.replica not in some:
            some = (*some, home.replica)
        ready = [replica for replica in some if replica.is_ready and replica not in failed]
        if ready:
            return self.choose(ready, home) if len(ready) > 1 else ready[0]
        left = [replica for replica in self._replicas if _can_serve(replica, failed)]
        if not left and self.restored:
            left = [replica for replica in self._replicas if replica not in failed]
        if not left:
            states = ", ".join(f"{replica.name} is {replica.state}" for replica in self._replicas)
            raise EngineDead(f"engine {self.name} has no replica that serves: {states}")
        return min(
            left,
            key=lambda each: (not each.is_ready, each.state is EngineState.LOST, each.usage.in_flight),
        )

    async def _test(self, replica: EngineHandle, request: GenerateRequest, call: Call, sends: int) -> None:
        """Generate the next tokens of a reply and discard them. Raises EngineDead if the replica dies of them.

        A reply that cannot be resumed is generated from its beginning. Its tokens are not compared with those that the
        caller has, because the caller gets none of them.
        """
        tokens = len(call.tokens) + call.test_tokens(request.stream_interval)
        tokens = min(tokens, request.max_tokens or tokens)
        params = request.sampling_params
        if "min_tokens" in params:
            params = {**params, "min_tokens": min(params["min_tokens"], tokens)}  # vLLM refuses more than max_tokens
        test = replace(_next_send(request, call, sends), max_tokens=tokens, sampling_params=params)
        with suppress(RequestRefused):  # the reply will be refused as well
            async with aclosing(replica.generate(test)) as chunks:
                async for _ in chunks:
                    self._quarantine.answered(call, replica)
        call.untested = False
        self._quarantine.ended(call)

    def _rest_of_reply(
        self, replica: EngineHandle, request: GenerateRequest, call: Call, sends: int
    ) -> AsyncGenerator[Chunk, None]:
        """Return a stream of the part of the reply that the caller does not have yet."""
        chunks = replica.generate(_next_send(request, call, sends))
        if not call.tokens or request.resumable:
            return chunks
        return self._replay(chunks, replica, call)

    async def _replay(
        self, chunks: AsyncGenerator[Chunk, None], replica: EngineHandle, call: Call
    ) -> AsyncGenerator[Chunk, None]:
        """Stream what the caller does not have of a reply that is generated again from its beginning."""
        replay = ReplyReplay(self.name, call.tokens, call.characters)
        async with aclosing(chunks):
            async for chunk in chunks:
                self._quarantine.answered(call, replica)
                if (new_part := replay.new_part(chunk)) is not None:
                    yield new_part


def _next_send(request: GenerateRequest, call: Call, sends: int) -> GenerateRequest:
    """Return the request as it is sent after `sends` earlier times."""
    if sends:  # a new id tells the attempts apart in vLLM's logs and traces
        request = replace(request, request_id=f"{request.request_id}~{sends}")
    if call.tokens:
        request = replace(request, has_begun=True, resume_tokens=tuple(call.tokens) if request.resumable else ())
    return request


def _least_loaded(ready: Sequence[EngineHandle], home: Home | None = None) -> EngineHandle:
    del home
    return min(ready, key=lambda replica: replica.usage.in_flight)


def gathered(engines: Mapping[str, EngineHandle], restored: bool = False) -> dict[str, Replicas]:
    """Return the replicas of each engine, given all of them by name. Replicas describes `restored`."""
    replicas_of: defaultdict[str, list[EngineHandle]] = defaultdict(list)
    for name, engine in engines.items():
        replicas_of[engine_of(name)].append(engine)
    return {engine: Replicas(engine, each, restored) for engine, each in replicas_of.items()}


def _can_serve(replica: EngineHandle, failed: Container[EngineHandle]) -> bool:
    """Return True unless a replica has failed, for this request at least, or is absent."""
    return replica not in failed and replica.state is not EngineState.ABSENT


class _Meter:
    """A meter that counts a request at one replica at a time and charges it a part of the replica's memory and time."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._replica: EngineHandle | None = None
        self._counted = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._counted.close()

    def at(self, replica: EngineHandle) -> None:
        """Count the request at a replica from now on. Nothing changes if it counts there already."""
        if replica is not self._replica:
            self._counted.close()
            self._replica = replica
            self._counted.enter_context(metered(replica, self._request))


@contextmanager
def metered(replica: EngineHandle, request: GenerateRequest) -> Iterator[None]:
    """Count a request of a replica, and charge it for its part of the replica's memory and time."""
    with replica.usage.request(request.rank(asyncio.get_running_loop().time()), request.since_s):
        charged_before = replica.usage.charged()
        try:
            yield
        finally:
            request.account.add(replica.usage.charged() - charged_before, replica.limits.device_bytes)
