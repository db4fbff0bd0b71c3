"""What an engine may use, the limits that a grant is checked against, and the outcomes of a resize."""

import asyncio
import math
from dataclasses import dataclass


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
