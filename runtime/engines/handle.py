"""The interface to one engine. The rest of Troupe reaches engines through it alone.

Errors: RequestRefused if the engine refuses a request, EngineDead if its process is gone, EngineError otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from runtime.engines.grant import EngineLimits, Grant, ResizeOutcome
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import UsageMeter
from runtime.errors import Death, EngineDead


class EngineState(StrEnum):
    """The states of an engine, in the order of its life.

    LOADING and LOADED refer to the weights. Only a READY engine admits requests. A DEAD engine is restarted, unless it
    has died too often: then it is FAILED.

    A DRAINING engine finishes its running requests before it sleeps. An ASLEEP engine has a process without weights. A
    COLD engine has no process. A WAKING engine takes its memory back. An ABSENT replica has no process, and no request
    waits for it: only the placement starts it. A LOST engine is on a machine that does not answer.
    """

    STARTING = "starting"
    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    COLD = "cold"
    WAKING = "waking"
    ABSENT = "absent"
    LOST = "lost"
    CLOSED = "closed"
    DEAD = "dead"
    FAILED = "failed"


SLEEPING = (EngineState.ASLEEP, EngineState.COLD)
"""States of an engine that sleeps, with or without its process."""
ABLE_TO_WAKE = (*SLEEPING, EngineState.ABSENT)
"""States from which an engine can be woken. It then has no weights on the device."""


@dataclass(frozen=True)
class Work:
    """The work of an engine's steps since it started, in counts that only grow.

    - `steps`: steps that computed at least one token; `busy_s`: the seconds that they took together.
    - `sequences`: the sequences in a step, summed over the steps.
    - `prompt_tokens`: the tokens of a step beyond one for each sequence, without draft tokens, summed over the steps.
      These are tokens of prompts, and of replies that are computed again after a preemption.
    """

    steps: int = 0
    busy_s: float = 0.0
    sequences: int = 0
    prompt_tokens: int = 0

    def plus(self, seconds: float, sequences: int, prompt_tokens: int) -> "Work":
        """Return the counts after another step."""
        return Work(
            self.steps + 1, self.busy_s + seconds, self.sequences + sequences, self.prompt_tokens + prompt_tokens
        )


@dataclass(frozen=True)
class EngineStats:
    """An engine's latest figures.

    - `grant`: the grant in force, or the newest one if its shrink is deferred. None until the engine has started.
    - `kv_cache_bytes`: the size of the KV cache; `kv_cache_usage`: the part of it that is in use, from 0 to 1.
    - `running`, `waiting`: requests at this moment.
    - `preemptions`, `requests`, `prompt_tokens`, `completion_tokens`, `work`: counts since the engine started.
    - `pid`: the process that uses the device; None if there is none.
    - `held`: the requests that arrived while it did not serve because it slept, since it was made.
    - `sleep_s`, `wake_s`: how long it takes to go to sleep and to wake, averaged over the latest times. Until the first
      time, `wake_s` is the duration of the start.
    """

    state: EngineState
    grant: Grant | None = None
    kv_cache_bytes: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    preemptions: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    work: Work = Work()
    pid: int | None = None
    held: int = 0
    sleep_s: float = 0.0
    wake_s: float = 0.0


class Recalled(Exception):
    """An engine took a request back before its first token, because it drains. The request can be sent again."""


class EngineHandle(ABC):
    """One engine, as an async context manager: entering starts it, leaving always closes it.

    `usage` counts its requests in flight and what each of them is charged. `Replicas`, which sends the requests, counts
    them in it. `on_death` is called when a process that served requests has died, before another one serves.
    """

    name: str
    usage: UsageMeter
    on_death: Callable[[Death], None] = staticmethod(lambda death: None)

    @abstractmethod
    async def start(self) -> None:
        """Start the engine. Raise EngineError, which names the log file, if it does not start."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request. Closing the generator early aborts the request.

        Raises RequestRefused if the engine refuses the request, for example because its prompt is too long, Recalled
        if it drains before the first token, and EngineDead if its process is gone.
        """

    @property
    def state(self) -> EngineState:
        """The state in `stats`."""
        return self.stats().state

    @property
    def is_ready(self) -> bool:
        """Return True if the engine serves requests, by its last known state."""
        return self.state is EngineState.READY

    async def until_ready(self) -> None:
        """Wait until the engine serves requests. Raise EngineDead if it never will again."""
        if self.state is not EngineState.READY:
            raise EngineDead(f"engine {self.name} is {self.state}")

    @property
    @abstractmethod
    def limits(self) -> EngineLimits:
        """The bounds of the engine's grants. Raises EngineError until the engine has started for the first time."""

    @property
    def held_bytes(self) -> int:
        """The bytes that the engine holds on the device at most. Raises EngineError as `limits` does."""
        stats = self.stats()
        if stats.state is EngineState.ASLEEP:
            return self.limits.asleep_bytes
        if stats.state in (EngineState.COLD, EngineState.ABSENT) or stats.grant is None:
            return 0
        return self.limits.held_bytes(stats.grant.gpu_memory_utilization)

    @property
    def asleep_bytes(self) -> int:
        """The bytes that the engine keeps on the device if it sleeps now. Raises EngineError as `limits` does."""
        return self.limits.asleep_bytes

    @abstractmethod
    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        """Change the engine's memory and concurrency while its requests run.

        A larger grant is in force when this returns. A smaller one keeps new work off the memory that it takes away;
        requests that use this memory may finish for `grace_s` seconds and are preempted after that. A newer resize
        supersedes a deferred one. A grant with `preempt` preempts all running requests at once.

        Returns Rejected, and raises nothing, if the grant is impossible or the engine is gone.
        """

    @abstractmethod
    async def sleep(self, deep: bool = False) -> None:
        """Release the weights and the KV cache. Requests in flight finish first.

        `deep` also ends the process. On a CPU the process always ends, because vLLM frees no memory there otherwise.
        On a GPU the process stays, and its context and CUDA graphs with it: `limits.asleep_bytes`.
        Raises EngineError if the engine is not ready, or if it cannot give its memory back.
        """

    @abstractmethod
    async def wake(self) -> None:
        """Take back what `sleep` gave up, and serve requests with the smallest KV cache.

        The caller must have claimed this memory. Raises EngineError if the engine does not sleep or does not wake.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return the latest figures without waiting for the engine."""

    @abstractmethod
    async def pulse(self) -> None:
        """Return once the engine has completed a round of its loop, which shows that it lives. Raise EngineDead."""

    def excuse_death(self) -> None:  # noqa: B027  only a supervised engine counts its deaths
        """Note that a request caused a death, so that it does not count against the engine.

        The death is the latest that is not excused yet. This is called once for each death that the request caused.
        """

    @abstractmethod
    def kill(self) -> None:
        """Kill the engine's process. Its requests in flight raise EngineDead."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and free everything that it holds. It is safe to call this twice."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
