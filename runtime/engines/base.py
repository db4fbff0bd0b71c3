"""The one narrow seam to an engine: what it is told, what it streams back, what it says of itself.

Everything above knows engines by these types alone. Errors: EngineError when a request is refused, EngineDead when
the process behind the handle is gone.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from agents.role import Message


class EngineState(StrEnum):
    """The life of an engine, in order; LOADING and LOADED are of its weights."""

    STARTING = "starting"
    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"
    CLOSED = "closed"
    DEAD = "dead"


class EngineSpec(BaseModel):
    """What a configuration says of one engine.

    `gpu_memory_utilization` is the share of the device that the engine may hold, weights included. On CPU the KV
    cache is `kv_cache_memory_bytes`; on a GPU leaving it out lets vLLM measure what the share leaves for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="a folder, relative to the configuration, or a hub's model name")
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    kv_cache_memory_bytes: ByteSize | None = Field(default=None, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)
    max_num_seqs: int = Field(default=64, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool = False
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    vllm: Mapping[str, Any] = Field(default_factory=dict, description="further arguments of vLLM's engine, as they are")

    @field_validator("vllm")
    @classmethod
    def _not_ours(cls, further: Mapping[str, Any]) -> Mapping[str, Any]:
        """What Troupe sets itself is not to be set behind its back."""
        ours = {*cls.model_fields, "additional_config", "disable_log_stats", "distributed_executor_backend"}
        if taken := sorted(ours & set(further)):
            place = "is a key beside vllm" if taken[0] in cls.model_fields else "is set by Troupe"
            raise ValueError(f"{taken[0]} {place}, not one in it")
        return further


@dataclass(frozen=True)
class GenerateRequest:
    """One chat to be answered. `schema` holds the reply to a JSON schema; `seed` None leaves sampling to chance."""

    request_id: str
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens as they come: text and ids since the last chunk, and when they came (time.monotonic seconds).

    `finish` is None until the last chunk, then vLLM's finish reason ("stop", "length").
    """

    text: str
    token_ids: tuple[int, ...]
    time_s: float
    prompt_tokens: int
    finish: str | None = None


@dataclass(frozen=True)
class EngineStats:
    """What an engine says of itself at this moment; counts are since its start."""

    state: EngineState
    running: int
    waiting: int
    kv_cache_usage: float
    requests: int
    prompt_tokens: int
    completion_tokens: int


class EngineHandle(ABC):
    """One engine. An async context manager owns its life: entering starts it, leaving closes it, always."""

    name: str

    @abstractmethod
    async def start(self) -> None:
        """Bring the engine up. Raises EngineError with the place of its log."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Stream the reply. Closing the iterator early aborts the request.

        Raises EngineError for a request that the engine refuses (a prompt beyond its length, say), EngineDead when
        it is gone.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The latest figures; never blocks."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine and free what it holds. May be called twice."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
