"""The interface to one engine: the only way in which the rest of Troupe reaches it.

Errors: RequestRefused if the engine refuses a request, EngineDead if its process is gone, EngineError otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from runtime.engines.grant import EngineLimits, Grant, ResizeOutcome
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import UsageMeter


class EngineState(StrEnum):
    """The life of an engine, in order; LOADING and LOADED are of its weights.

    A DEAD engine is started again; one that keeps dying has FAILED.
    """

    STARTING = "starting"
    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"
    CLOSED = "closed"
    DEAD = "dead"
    FAILED = "failed"


@dataclass(frozen=True)
class EngineStats:
    """What an engine says of itself at this moment; counts are since its start.

    `grant` is the one in force, or under way where a shrink is deferred; None until the engine is up.
    """

    state: EngineState
    grant: Grant | None
    kv_cache_bytes: int
    running: int
    waiting: int
    kv_cache_usage: float
    preemptions: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


class EngineHandle(ABC):
    """One engine. An async context manager owns its life: entering starts it, leaving closes it, always.

    `usage` knows its requests in flight and what each is charged.
    """

    name: str
    usage: UsageMeter

    @abstractmethod
    async def start(self) -> None:
        """Bring the engine up. Raises EngineError with the place of its log."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply. Closing the iterator early aborts the request.

        Raises RequestRefused for a request that the engine refuses (a prompt beyond its length, say), EngineDead when
        it is gone.
        """

    @property
    @abstractmethod
    def limits(self) -> EngineLimits:
        """What grants are held against. Raises EngineError before the engine is up for the first time."""

    @abstractmethod
    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        """Move memory and concurrency while requests run.

        Growing is in force when this returns. Shrinking keeps new work off what is to go at once; what is in use
        there may finish for `grace_s` seconds, then its requests are preempted. A newer resize supersedes a deferred
        one. Raises nothing that a grant could be wrong with: that is Rejected.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The latest figures; never blocks."""

    @abstractmethod
    async def pulse(self) -> None:
        """Return once the engine has been through its loop: it lives. Raises EngineDead."""

    @abstractmethod
    def kill(self) -> None:
        """End the engine's process at once, from outside; requests in flight raise EngineDead."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine and free what it holds. May be called twice."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
