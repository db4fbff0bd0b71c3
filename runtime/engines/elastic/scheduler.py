"""A scheduler whose limits move while it runs: blocks, sequences and tokens a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from runtime.engines.elastic.pool import ElasticBlockPool


class ElasticScheduling:
    """Mixin: vLLM's scheduler, synchronous or not, over an elastic pool.

    `after_step` is called after every step. With steps in flight (async scheduling) a block that is let go counts as
    in use until the steps that may write to it are through: `defer_block_free`.
    """

    if TYPE_CHECKING:  # what is used of the scheduler that this is mixed into
        kv_cache_manager: Any
        scheduler_config: Any
        vllm_config: Any
        running: list[Request]
        prev_step_scheduled_req_ids: set[str]
        max_num_running_reqs: int
        max_model_len: int
        _preempt_request: Callable[[Request, float], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _elastic_pools():
            super().__init__(*args, **kwargs)
        self.pool: ElasticBlockPool = self.kv_cache_manager.block_pool
        self.after_step: Callable[[], None] | None = None
        if self.vllm_config.max_concurrent_batches > 1:
            self.defer_block_free = True

    def set_limits(self, capacity: int, active_seqs: int, step_tokens: int) -> None:
        """Move all three: blocks, sequences admitted to run, tokens a step. What runs goes on running."""
        self.pool.set_capacity(capacity)
        self.kv_cache_manager.watermark_blocks = int(self.scheduler_config.watermark * capacity)
        self.max_num_active_reqs = active_seqs
        self.max_num_scheduled_tokens = step_tokens

    def preempt_drainers(self) -> int:
        """Preempt every running request that holds a draining block; how many. vLLM computes them again."""
        holders = [request for request in self.running if not self._holdings(request).isdisjoint(self.pool.draining)]
        for request in reversed(holders):  # each goes to the front of the queue: in the end they stand as they ran
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
            # It may be resumed in the very next step, and must not look as if it had run in the one before.
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        return len(holders)

    def _holdings(self, request: Request) -> set[int]:
        return {block for group in self.kv_cache_manager.get_block_ids(request.request_id) for block in group}

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if self.after_step:
            self.after_step()
        return outputs


class ElasticScheduler(ElasticScheduling, Scheduler):  # type: ignore[misc]  # vLLM is not analysed
    """Steps one after another: the CPU."""


class ElasticAsyncScheduler(ElasticScheduling, AsyncScheduler):  # type: ignore[misc]  # vLLM is not analysed
    """A step is scheduled while the one before it runs: CUDA."""


@contextmanager
def _elastic_pools() -> Iterator[None]:
    """vLLM's cache manager makes its pool by this name, and offers no other way to give it another."""
    stock = kv_cache_coordinator.BlockPool
    kv_cache_coordinator.BlockPool = ElasticBlockPool
    try:
        yield
    finally:
        kv_cache_coordinator.BlockPool = stock
