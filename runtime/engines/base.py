"""The one narrow seam to an engine: what it is told, what it streams back, what it says of itself.

Everything above knows engines by these types alone. Errors: EngineError when a request is refused, EngineDead when
the process behind the handle is gone.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from agents.role import Message
from runtime.engines.account import Account


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


class EngineSpec(BaseModel):
    """What a configuration says of one engine.

    `gpu_memory_utilization` is the share of the device that the engine begins with, weights included; the KV cache
    gets what the share leaves, or `kv_cache_memory_bytes` where that is given. While it runs the engine may be
    granted up to `max_gpu_memory_utilization`; the address space for that is reserved at its start. On a GPU memory
    moves in granules of `kv_granule_bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="a folder, relative to the configuration, or a hub's model name")
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    max_gpu_memory_utilization: float = Field(default=1, gt=0, le=1)
    kv_cache_memory_bytes: ByteSize | None = Field(default=None, gt=0)
    kv_granule_bytes: ByteSize = Field(default=ByteSize(32 << 20), gt=0)
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


PRIORITY = 5
"""A request's, where none is given; 1 is the most urgent."""


COUNTS_THE_REPLY = frozenset(
    {
        "frequency_penalty",
        "presence_penalty",
        "repetition_detection",
        "structured_outputs",
        "thinking_token_budget",
    }
)
"""Arguments of SamplingParams whose effect depends on which of the tokens before the next one are the reply's."""


@dataclass(frozen=True)
class GenerateRequest:
    """One chat to be answered, or, where there is a `prompt`, that to be gone on with: a text, or tokens.

    `max_tokens` None leaves it at what the model's length leaves. `schema` holds the reply to a JSON schema; `seed`
    None leaves sampling to chance; `logprobs` asks for those of so many of the likeliest tokens beside each one
    written. The reply's first token and last come as they are written, those between them so many together as
    `stream_interval` says. `further` are further arguments of vLLM's SamplingParams, as they are.

    Of the requests that wait, those of `priority` 1 are served first, and of equal ones that whose job began first:
    `since_s` on the loop's clock, None for one that stands alone and begins as it comes. So a job's later calls come
    before the first ones of jobs that began after it. Served as they come, every call of a job would wait behind all
    jobs, and where there is a queue all would be late together (as Autellix has it, arXiv 2502.13965).

    `given` are tokens of the reply that the caller has already, from an engine that died: what is streamed goes on
    after them, and `max_tokens` counts them.
    """

    request_id: str
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    given: tuple[int, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    logprobs: int | None = None
    priority: int = PRIORITY
    since_s: float | None = None
    stream_interval: int = 1
    further: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resumable(self) -> bool:
        """Whether the rest of a reply follows from the tokens that were written, put behind the prompt. A grammar, and
        what counts the tokens of the reply, start anew with each request."""
        return self.schema is None and not COUNTS_THE_REPLY & self.further.keys()

    def rank(self, now_s: float) -> int:
        """The less, the sooner it is served; where memory is short, that with the highest gives way."""
        return (self.priority << 44) + int(1000 * (now_s if self.since_s is None else self.since_s))


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written, its logarithmic probability, and the likeliest in its place, the likeliest first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Tokens as they come: text and ids since the last chunk, and when they came (time.monotonic seconds).

    `finish` is None until the last chunk, then vLLM's finish reason ("stop", "length"). `logprobs`, one a token, where
    they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    time_s: float
    prompt_tokens: int
    finish: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Grant:
    """What an engine may use: its share of the device, weights included; how many sequences it runs at once; how many
    tokens a step may carry."""

    gpu_memory_utilization: float
    max_active_seqs: int
    max_step_tokens: int


@dataclass(frozen=True)
class EngineLimits:
    """What an engine that is up has found of itself, and how far grants can go. Memory in bytes.

    `fixed_bytes` is what it holds besides its KV cache, or will take while it computes a step. Below `kv_floor_bytes`
    the KV cache could not hold one sequence of the model's full length, and the engine could not finish its work.
    Memory is handed out to sequences in blocks of `block_tokens` tokens, `block_bytes` each.

    `device_uuid` is that of the GPU or MIG instance that the engine's process runs on, as CUDA reports it there: in
    lower case, without a prefix. It is empty on the host.
    """

    device_bytes: int
    fixed_bytes: int
    kv_floor_bytes: int
    kv_ceiling_bytes: int
    seqs_ceiling: int
    step_tokens_floor: int
    step_tokens_ceiling: int
    block_bytes: int = 0
    block_tokens: int = 0
    device_uuid: str = ""

    def held_bytes(self, share: float) -> int:
        """What a share of the device comes to, all included: bytes that `share` made a share of come out the same."""
        return int(share * self.device_bytes + 1e-3)  # and not one fewer, which may cost a block

    def kv_cache_bytes(self, share: float) -> int:
        """What a share of the device leaves for the KV cache; below zero where the rest alone does not fit."""
        return self.held_bytes(share) - self.fixed_bytes

    def share(self, kv_cache_bytes: int) -> float:
        """The share of the device that an engine with such a KV cache holds."""
        return (self.fixed_bytes + kv_cache_bytes) / self.device_bytes

    def complaint(self, grant: Grant) -> str | None:
        """Why a grant cannot be, naming the field and its bounds; None when it can."""
        share = grant.gpu_memory_utilization
        least, most = self.share(self.kv_floor_bytes), self.share(self.kv_ceiling_bytes)
        if not math.isfinite(share) or not least <= share:
            return f"gpu_memory_utilization {share:g} is below the engine's floor of {least:.4f}"
        if share > most + 1e-9:
            return f"gpu_memory_utilization {share:g} is above the engine's ceiling of {most:.4f}"
        for name, value, low, high in (
            ("max_active_seqs", grant.max_active_seqs, 1, self.seqs_ceiling),
            ("max_step_tokens", grant.max_step_tokens, self.step_tokens_floor, self.step_tokens_ceiling),
        ):
            if not low <= value <= high:
                return f"{name} {value} is not within {low} to {high}"
        return None


@dataclass(frozen=True)
class Applied:
    """A grant is in force. `moved_bytes` were backed or given back within `seconds`, of which the engine's steps had to
    wait `stall_seconds`; `preempted` requests gave way and are computed again."""

    grant: Grant
    kv_cache_bytes: int
    moved_bytes: int
    seconds: float
    stall_seconds: float
    preempted: int


@dataclass(frozen=True)
class Rejected:
    """A grant was refused, and nothing has changed."""

    grant: Grant
    reason: str


@dataclass(frozen=True)
class Superseded:
    """A deferred grant gave way to a newer one before it was in force."""

    grant: Grant


@dataclass(frozen=True)
class Deferred:
    """Limits hold at once, but `held_bytes` beyond the grant are still held, since they or what lies below them are in
    use, for `grace_s` seconds at most before their requests are preempted. `settled` says how it ended."""

    grant: Grant
    held_bytes: int
    grace_s: float
    settled: "asyncio.Future[Applied | Rejected | Superseded]"


ResizeOutcome = Applied | Deferred | Rejected


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

    `account` knows its requests in flight and what each is charged.
    """

    name: str
    account: Account

    @abstractmethod
    async def start(self) -> None:
        """Bring the engine up. Raises EngineError with the place of its log."""

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
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
