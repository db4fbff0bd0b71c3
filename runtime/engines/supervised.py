"""An engine that is watched, restarted when it dies or hangs, and put to sleep and woken when it is told to.

Requests wait with `until_ready` during a restart or a sleep. A reply ends with EngineDead if the process dies:
`replicas` sends its request again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace

from runtime.engines.grant import EngineLimits, Grant, Rejected, ResizeOutcome
from runtime.engines.handle import ABLE_TO_WAKE, SLEEPING, EngineHandle, EngineState, EngineStats, Recalled
from runtime.engines.ledger import Ledger
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import Held, UsageMeter
from runtime.errors import Death, EngineDead, EngineError

MakeEngine = Callable[[Grant | None], EngineHandle]
"""Makes a new engine that starts with a grant. None stands for the grant in the engine's specification."""
OnState = Callable[[EngineState], None]


DRAIN_S = 60.0
"""An engine that has not drained after this many seconds continues to serve."""
UNLIMITED_BYTES = 1 << 62
NEWEST_WEIGHT = 0.3
"""Weight of the newest duration of a sleep or a wake in the average."""


@dataclass(frozen=True)
class Patience:
    """The rules by which a supervised engine counts as hanging, and by which it is restarted.

    - `hang_s`: an engine that takes longer for a pulse hangs and is killed.
    - `pulse_every_s`: the time between two pulses.
    - `backoff_s`: the pauses before the first, second, ... restart within `within_s`. The last one repeats.
    - `restarts`, `within_s`: an engine that needs more than this many restarts within this time has failed. Restarts
      after deaths that requests have caused do not count.
    """

    hang_s: float = 60
    pulse_every_s: float = 2
    backoff_s: tuple[float, ...] = (0, 1, 2, 5, 10)
    restarts: int = 5
    within_s: float = 300


@dataclass
class _Fault:
    """A death or a failed start of the engine. `excused` is True if a request has caused it."""

    at_s: float
    excused: bool = False


class SupervisedEngine(EngineHandle):
    """A supervisor of one engine: it replaces the engine by a new one from `make` if it dies or hangs.

    `start` raises the error of the first engine if it does not start. Later engines are restarted instead. `on_state`
    is called with every state that the engine enters, but not while it starts. Engines that share a `moving` lock go to
    sleep and wake one after the other: vLLM can hang if two of them do so at once on one GPU. `host` is the ledger of
    the host memory that holds copies of sleeping engines' weights. An engine whose copy does not fit ends its process
    when it sleeps.
    """

    def __init__(
        self,
        name: str,
        make: MakeEngine,
        on_state: OnState = lambda state: None,
        patience: Patience | None = None,
        moving: asyncio.Lock | None = None,
        host: Ledger | None = None,
    ) -> None:
        self.name = name
        self.usage = UsageMeter()
        self._make = make
        self._on_state = on_state
        self._listener_raised = False
        self._patience = patience or Patience()
        self._moving = moving or asyncio.Lock()
        self._host = host or Ledger(UNLIMITED_BYTES)
        self._engine = make(None)
        self._ready = asyncio.Event()
        self._check_now = asyncio.Event()
        self._mourned: EngineHandle | None = None
        self._limits: EngineLimits | None = None
        self._failure: str | None = None
        self._faults: deque[_Fault] = deque()
        self._held = 0
        self._being_served = 0
        self._none_served = asyncio.Event()
        self._none_served.set()
        self._without_token: set[asyncio.Timeout] = set()
        self._rest: EngineState | None = None  # DRAINING, ASLEEP, COLD, WAKING or ABSENT; None if it is awake
        self._sleep_s: float | None = None
        self._start_s: float | None = None
        self._wake_s: float | None = None  # of a process that sleeps
        self._awake = asyncio.Event()
        self._awake.set()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        began_s = asyncio.get_running_loop().time()
        await self._engine.start()
        self._start_s = asyncio.get_running_loop().time() - began_s
        self._enter_ready()
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    def begin_absent(self, limits: EngineLimits, start_s: float) -> None:
        """Begin without a process. `limits` and `start_s` are those of another replica, until this one has started."""
        self._limits, self._start_s = limits, start_s
        self.usage.gpus = limits.gpus
        self.usage.hold(0, Held.ASLEEP)
        self._awake.clear()
        self._enter_absent()
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    @property
    def start_s(self) -> float:
        """Return the seconds that its process takes to start."""
        return self._start_s or 0.0

    async def leave(self) -> None:
        """Finish the requests that have a token, end the process, and be absent. Raises EngineError as `sleep` does."""
        if self._rest in SLEEPING:
            self._enter_absent()  # first, so that nothing wakes it while its process ends
            self.usage.hold(0, Held.ASLEEP)
            async with self._moving:
                if self._rest is EngineState.ABSENT:
                    await self._end_process()
        else:
            await self.sleep(deep=True)
            self._enter_absent()

    def _enter_absent(self) -> None:
        self._enter_rest(EngineState.ABSENT)
        self._ready.set()  # requests that wait for the engine raise EngineDead now, and go to another replica

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        engine = self._engine
        try:
            with self._serving():
                async with aclosing(engine.generate(request)) as chunks:
                    chunk = await (anext(chunks, None) if request.has_begun else self._first_chunk(chunks))
                    while chunk is not None:
                        yield chunk
                        chunk = await anext(chunks, None)
        except EngineDead as error:
            self._report_death(engine, error.death)
            raise

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Count a request that the engine serves. It cannot sleep before all of them have ended."""
        self._being_served += 1
        self._none_served.clear()
        try:
            yield
        finally:
            self._being_served -= 1
            if not self._being_served:
                self._none_served.set()

    async def _first_chunk(self, chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
        """Return the first chunk of a reply. Raise Recalled if the engine begins to drain before it has a token."""
        try:
            async with asyncio.timeout(None) as recall:
                self._without_token.add(recall)
                return await anext(chunks, None)
        except TimeoutError:
            raise Recalled from None
        finally:
            self._without_token.discard(recall)

    def _report_death(self, engine: EngineHandle, death: Death) -> None:
        """Report the death of an engine once, and check the engine now. Do neither if it was ended on purpose."""
        if self._rest in (EngineState.COLD, EngineState.ABSENT):
            return
        if self._failure is None and engine is self._engine and engine is not self._mourned:
            self._mourned = engine
            self._note_fault()
            self.on_death(death)
            self._suspect()

    def excuse_death(self) -> None:
        fault = next((fault for fault in reversed(self._faults) if not fault.excused), None)
        if fault is not None:
            fault.excused = True

    def _suspect(self) -> None:
        """Hold new requests back and check the engine now."""
        self._ready.clear()
        self._check_now.set()

    @property
    def is_ready(self) -> bool:
        resting = self._rest is not None or self._failure is not None
        return self._ready.is_set() and not resting and self._engine.state is EngineState.READY

    async def until_ready(self) -> None:
        self._held += self._rest is not None
        while True:
            await self._ready.wait()
            if self._failure is not None:
                raise EngineDead(self._failure)
            if self._rest is EngineState.ABSENT:
                raise EngineDead(f"engine {self.name} is absent")
            if self._rest is not None:  # it has begun to drain since
                self._ready.clear()
            elif self._engine.state is EngineState.READY:
                return
            else:
                self._suspect()

    def _tell(self, state: EngineState) -> None:
        """Report a state. Log the first error of `on_state`, which must not keep the engine from being restarted."""
        try:
            self._on_state(state)
        except Exception:
            if not self._listener_raised:
                self._listener_raised = True
                logging.getLogger(__name__).exception("engine %s: its listener raised", self.name)

    async def _watch(self) -> None:
        """Check the engine regularly and restart it if it is dead, until it has failed or is closed.

        An engine that dies while it drains is not restarted: what it still had to serve is held until it wakes.
        """
        while self._failure is None:
            if not self._awake.is_set():
                await self._watch_sleep()
            elif not await self._is_alive() and self._rest is None:
                self._ready.clear()
                self._tell(EngineState.DEAD)
                await self._restart()

    async def _watch_sleep(self) -> None:
        """Wait a little for the engine to wake. If its process has died while it slept, free what is left of it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience.pulse_every_s):
                await self._awake.wait()
        if self._rest is EngineState.ASLEEP and self._engine.state is not EngineState.ASLEEP:
            self.usage.hold(0, Held.ASLEEP)
            self._enter_rest(EngineState.COLD)
            await self._end_process()

    async def _is_alive(self) -> bool:
        """Wait for the next check, then take the engine's pulse. Kill the engine if it hangs."""
        # asyncio.timeout rather than asyncio.wait_for, which can swallow a cancellation in Python 3.11.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience.pulse_every_s):
                await self._check_now.wait()
        self._check_now.clear()
        try:
            async with asyncio.timeout(self._patience.hang_s):
                await self._engine.pulse()
        except TimeoutError:
            self._report_death(self._engine, Death.HUNG)
            self._engine.kill()  # so that its requests raise EngineDead
            return False
        except EngineDead as error:
            if self._awake.is_set():  # otherwise it was put to sleep
                self._report_death(self._engine, error.death)
            return False
        except EngineError:  # the call failed, which it does in no engine that works
            self._report_death(self._engine, Death.HUNG)
            self._engine.kill()
            return False
        if self._rest is None:
            self._ready.set()
        return True

    async def _restart(self) -> None:
        """Start a new engine with the latest grant. Pause longer after each fault, and fail after too many."""
        grant = self._engine.stats().grant
        reason = "it died"
        while True:
            await self._end_process()
            faults = self._recent_faults()
            restarts = sum(not fault.excused for fault in faults) - 1
            if restarts >= self._patience.restarts:
                self._fail(f"{restarts} restarts within {self._patience.within_s:g} s; {reason}")
                return
            pauses_s = self._patience.backoff_s
            await asyncio.sleep(pauses_s[min(len(faults), len(pauses_s)) - 1])
            self._tell(EngineState.STARTING)
            self._engine = self._make(grant)
            try:
                await self._engine.start()
            except EngineError as error:
                reason = str(error)
                self._note_fault()
            else:
                self._enter_ready()
                return

    def _note_fault(self) -> None:
        self._faults.append(_Fault(asyncio.get_running_loop().time()))

    def _recent_faults(self) -> Sequence[_Fault]:
        oldest_s = asyncio.get_running_loop().time() - self._patience.within_s
        while self._faults and self._faults[0].at_s < oldest_s:
            self._faults.popleft()
        return self._faults

    def _fail(self, reason: str) -> None:
        self._failure = f"engine {self.name} keeps failing: {reason}"
        self._tell(EngineState.FAILED)
        self._ready.set()  # requests that wait for the engine now raise the failure

    def _enter_ready(self) -> None:
        self._rest = None
        self._awake.set()
        self._note_grant()
        self._ready.set()
        self._tell(EngineState.READY)

    async def sleep(self, deep: bool = False) -> None:
        """Hold new requests, let the engine finish those that have a token, then give its memory back.

        Requests without a token, queued ones above all, are taken back and held until the engine wakes. If the call is
        cancelled while the engine drains, or if it drains for longer than DRAIN_S, it continues to serve. In the second
        case this raises EngineError.
        An engine that does not give its memory back is ended, which frees it too.
        """
        state = self.state
        if state is not EngineState.READY:
            raise EngineError(f"engine {self.name} is {state} and cannot go to sleep")
        self._ready.clear()
        self._enter_rest(EngineState.DRAINING)
        try:
            await self._drain()
        except (asyncio.CancelledError, EngineError):
            self._rest = None
            self._tell(self.state)
            self._check_now.set()  # the check lets requests pass again, or finds that the engine has died
            raise
        self._awake.clear()
        async with self._moving:
            began_s = asyncio.get_running_loop().time()
            await self._sleep_or_end(deep)
            self._sleep_s = _averaged(self._sleep_s, asyncio.get_running_loop().time() - began_s)
        asleep = self._engine.state is EngineState.ASLEEP
        self.usage.hold(self.limits.asleep_bytes if asleep else 0, Held.ASLEEP)
        self._enter_rest(EngineState.ASLEEP if asleep else EngineState.COLD)

    async def _sleep_or_end(self, deep: bool) -> None:
        """Put the engine to sleep. End its process if that fails or hangs, or if its weights do not fit the host."""
        with suppress(EngineError, TimeoutError):
            if deep or not self._can_keep_process():
                await self._engine.sleep(deep=True)
            else:
                self._host.claim(self.name, self.limits.copy_bytes)
                async with asyncio.timeout(self._patience.hang_s):
                    await self._engine.sleep()
        if self._engine.state is not EngineState.ASLEEP:
            await self._end_process()

    def _can_keep_process(self) -> bool:
        """Return True if the engine can sleep with its process alive, and the host has room for its weights."""
        more_bytes = self.limits.copy_bytes - self._host.held.get(self.name, 0)
        return self.limits.copy_bytes > 0 and more_bytes <= self._host.free

    @property
    def asleep_bytes(self) -> int:
        return self.limits.asleep_bytes if self._sleeps_with_process() else 0

    def _sleeps_with_process(self) -> bool:
        """Return True if the engine sleeps with its process alive, or would if it went to sleep now."""
        if self._rest in ABLE_TO_WAKE:
            return self._rest is EngineState.ASLEEP
        return self._can_keep_process()

    async def _end_process(self) -> None:
        """Close the engine. This frees everything that it holds, on the device and on the host."""
        await self._engine.close()
        self._host.record(self.name, 0)

    async def wake(self) -> None:
        """Wake the engine with the smallest KV cache. Attempts that fail are repeated after pauses, as restarts are.

        They do not count as restarts. If the last attempt fails, the engine has failed, or is absent again if it was,
        and EngineError is raised.
        """
        was_absent = self._rest is EngineState.ABSENT
        if self.state not in ABLE_TO_WAKE:
            raise EngineError(f"engine {self.name} is {self.state} and cannot wake")
        self._ready.clear()
        self._enter_rest(EngineState.WAKING)
        smallest = self.limits.smallest_grant
        self.usage.hold(self.limits.held_bytes(smallest.gpu_memory_utilization), Held.WAKING)
        for pause_s in (*self._patience.backoff_s[1:], None):
            try:
                await self._wake_once(smallest)
            except EngineError as error:
                await self._end_process()
                if pause_s is None:
                    self.usage.hold(0, Held.ASLEEP)
                    if was_absent:
                        self._enter_absent()
                    else:
                        self._fail(f"it does not wake: {error}")
                    raise
                await asyncio.sleep(pause_s)
            else:
                self._enter_ready()
                return

    async def _wake_once(self, grant: Grant) -> None:
        async with self._moving:
            began_s = asyncio.get_running_loop().time()
            if self._engine.state is EngineState.ASLEEP:
                await self._wake_process()
                self._wake_s = _averaged(self._wake_s, asyncio.get_running_loop().time() - began_s)
            else:
                await self._end_process()
                self._engine = self._make(grant)
                await self._engine.start()
                self._start_s = _averaged(self._start_s, asyncio.get_running_loop().time() - began_s)

    async def _wake_process(self) -> None:
        try:
            async with asyncio.timeout(self._patience.hang_s):
                await self._engine.wake()
        except TimeoutError:
            raise EngineError(f"engine {self.name} hung for {self._patience.hang_s:g} s while it woke") from None

    async def _drain(self) -> None:
        """Wait until no request is served. Raise EngineError after DRAIN_S: a caller may have stopped reading."""
        for recall in self._without_token:
            recall.reschedule(0)
        await self._admit_again()
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._none_served.wait()
        except TimeoutError:
            raise EngineError(f"engine {self.name} still serves requests after {DRAIN_S:g} s") from None

    async def _admit_again(self) -> None:
        """Let an engine whose admission is paused admit its waiting requests."""
        grant = self._engine.stats().grant
        if grant is not None and not grant.max_active_seqs:
            await self._engine.resize(replace(grant, max_active_seqs=self.limits.seqs_ceiling, preempt=False))

    def _enter_rest(self, state: EngineState) -> None:
        self._rest = state
        self._tell(state)

    @property
    def limits(self) -> EngineLimits:
        """The limits of the running engine. During a restart or a sleep, those of the previous engine."""
        return self._limits or self._engine.limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._failure is not None or self._rest is not None:
            return Rejected(grant, self._failure or f"engine {self.name} is {self._rest}")
        outcome = await self._engine.resize(grant, grace_s)
        if self._rest is EngineState.DRAINING:  # it has begun to drain since, and a pause would never end
            await self._admit_again()
        self._note_grant()
        return outcome

    def _note_grant(self) -> None:
        """Keep the limits of a ready engine, and charge for the memory of its grant from now on."""
        stats = self._engine.stats()
        if stats.state is EngineState.READY and stats.grant is not None:
            self._limits = self._engine.limits
            self.usage.gpus = self._limits.gpus
            self.usage.hold(self._limits.held_bytes(stats.grant.gpu_memory_utilization))

    @property
    def state(self) -> EngineState:
        state = EngineState.FAILED if self._failure is not None else self._rest or self._engine.state
        return EngineState.DEAD if state is EngineState.CLOSED else state  # it is being restarted

    def stats(self) -> EngineStats:
        stats, state = self._engine.stats(), self.state
        if state in (EngineState.COLD, EngineState.ABSENT):
            stats = replace(stats, kv_cache_bytes=0, pid=None)
        if state in ABLE_TO_WAKE:
            stats = replace(stats, grant=None, kv_cache_usage=0.0, running=0, waiting=0)
        return replace(
            stats,
            state=state,
            waiting=stats.waiting + max(self.usage.in_flight - self._being_served, 0),
            held=self._held,
            sleep_s=self._sleep_s or 0.0,
            wake_s=self._expected_wake_s(),
        )

    def _expected_wake_s(self) -> float:
        """Return how long the next wake takes. A first wake of a process copies as much as its first sleep did."""
        if self._limits is None or not self._sleeps_with_process():
            return self._start_s or 0.0
        return self._wake_s or self._sleep_s or self._start_s or 0.0

    async def pulse(self) -> None:
        await self._engine.pulse()

    def kill(self) -> None:
        self._engine.kill()

    async def close(self) -> None:
        self._failure = self._failure or f"engine {self.name} is closed"
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        self._ready.set()
        await self._end_process()


def _averaged(mean_s: float | None, newest_s: float) -> float:
    return newest_s if mean_s is None else mean_s + NEWEST_WEIGHT * (newest_s - mean_s)
