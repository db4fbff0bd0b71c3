"""Grants, the limits that they are checked against, and the outcomes of a resize."""

import asyncio
import math
from dataclasses import dataclass

_SHARE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Grant:
    """The memory and concurrency that an engine may use from now on.

    - `gpu_memory_utilization`: its share of the device, weights included.
    - `max_active_seqs`: how many requests it may run at once. 0 pauses admission: running requests continue, the others
      wait.
    - `max_step_tokens`: how many tokens it may process in one step.
    - `preempt`: preempt the requests that run, instead of letting them finish. vLLM computes them again once they are
      admitted. Possible only while admission is paused.
    """

    gpu_memory_utilization: float
    max_active_seqs: int
    max_step_tokens: int
    preempt: bool = False


@dataclass(frozen=True)
class EngineLimits:
    """The measurements of a running engine, and the bounds of its grants. All memory is in bytes.

    - `device_bytes`: the size of the device that shares refer to.
    - `fixed_bytes`: what the engine holds, or needs during a step, besides its KV cache.
    - `kv_floor_bytes`: the smallest KV cache. It holds one request of the model's full length, so that every request
      can finish, and all blocks that vLLM's warm-up writes.
    - `kv_ceiling_bytes`: the largest KV cache, bounded by the address space that was reserved at start.
    - `seqs_ceiling`, `step_tokens_floor`, `step_tokens_ceiling`: bounds of `max_active_seqs` (from 0) and
      `max_step_tokens`.
    - `block_bytes`, `block_tokens`: the size of a KV block in bytes and in tokens.
    - `device_uuids`: the UUIDs of the GPUs or the MIG instance of the engine's processes, as CUDA reports them there,
      in lower case and without a prefix. There are none on the host. An engine on several GPUs holds the same on each,
      and memory here is that of one.
    - `gpus`: the number of GPUs of the engine.
    - `asleep_bytes`: what the engine keeps on the device while it sleeps with its process alive.
    - `copy_bytes`: the host memory that a copy of its weights takes while it sleeps in this way; 0 if its process must
      end to free its memory, as on a CPU.
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
    device_uuids: tuple[str, ...] = ()
    asleep_bytes: int = 0
    copy_bytes: int = 0
    gpus: int = 1

    def held_bytes(self, share: float) -> int:
        """Return the bytes that a share of the device allows in total, including weights and buffers.

        This inverts `share`: a share computed from a number of bytes gives back the same number.
        """
        return int(share * self.device_bytes + 1e-3)  # rounding one byte down could cost a whole KV block

    def kv_cache_bytes(self, share: float) -> int:
        """Return the bytes that a share leaves for the KV cache. Negative if weights and buffers alone exceed it."""
        return self.held_bytes(share) - self.fixed_bytes

    def share(self, kv_cache_bytes: int) -> float:
        """Return the share of the device that the engine needs for a KV cache of this size."""
        return (self.fixed_bytes + kv_cache_bytes) / self.device_bytes

    @property
    def smallest_bytes(self) -> int:
        """The bytes that the engine holds with the smallest KV cache, weights and buffers included."""
        return self.fixed_bytes + self.kv_floor_bytes

    @property
    def smallest_grant(self) -> Grant:
        """The grant with the smallest KV cache, and with full concurrency."""
        return Grant(self.share(self.kv_floor_bytes), self.seqs_ceiling, self.step_tokens_ceiling)

    def violation(self, grant: Grant) -> str | None:
        """Return why a grant is impossible, naming the field and its bound, or None if it is possible."""
        share = grant.gpu_memory_utilization
        floor, ceiling = self.share(self.kv_floor_bytes), self.share(self.kv_ceiling_bytes)
        if not math.isfinite(share) or not floor <= share:
            return f"gpu_memory_utilization {share:g} is below the engine's floor of {floor:.4f}"
        if share > ceiling + _SHARE_TOLERANCE:
            return f"gpu_memory_utilization {share:g} is above the engine's ceiling of {ceiling:.4f}"
        for name, value, low, high in (
            ("max_active_seqs", grant.max_active_seqs, 0, self.seqs_ceiling),
            ("max_step_tokens", grant.max_step_tokens, self.step_tokens_floor, self.step_tokens_ceiling),
        ):
            if not low <= value <= high:
                return f"{name} {value} is not within {low} to {high}"
        if grant.preempt and grant.max_active_seqs:
            return "preempt is possible only with max_active_seqs 0"
        return None


@dataclass(frozen=True)
class Applied:
    """A grant is in force.

    - `kv_cache_bytes`: the size of the KV cache now.
    - `moved_bytes`: how much memory was backed or released.
    - `seconds`: how long the whole resize took; `stall_seconds`: how long of that the engine's steps had to wait.
    - `preempted`: how many requests were preempted. vLLM recomputes them.
    """

    grant: Grant
    kv_cache_bytes: int
    moved_bytes: int
    seconds: float
    stall_seconds: float
    preempted: int


@dataclass(frozen=True)
class Rejected:
    """A grant was refused and is not in force. `reason` says why."""

    grant: Grant
    reason: str


@dataclass(frozen=True)
class Superseded:
    """A newer grant replaced this deferred one before all of its memory had moved."""

    grant: Grant


@dataclass(frozen=True)
class Deferred:
    """A grant whose memory has not moved completely yet.

    From an engine, for a shrink: the grant's limits already apply to new work, and free memory has been released.
    Running requests still hold `held_bytes` more than the grant allows. They may finish within `grace_s` seconds and
    are preempted after that.

    From `Sharing.resize`, also for an engine that grows: donors have yet to release `held_bytes`. Until then the
    engine has grown by as much as was free.

    `settled` resolves to the final outcome.
    """

    grant: Grant
    held_bytes: int
    grace_s: float
    settled: "asyncio.Future[Applied | Rejected | Superseded]"


ResizeOutcome = Applied | Deferred | Rejected
