"""A scheduler whose limits change while it runs: KV blocks, running sequences, and tokens per step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from runtime.engines.elastic.pool import ElasticBlockPool
from runtime.engines.elastic.reports import PREEMPTIONS, WORK
from runtime.engines.handle import Work


class ElasticScheduling:
    """A mixin that puts vLLM's scheduler, synchronous or asynchronous, over an elastic block pool.

    The scheduler calls `after_step` after every step, if it is set. It counts what its steps do in `work`, and its
    preemptions, and sends the counts to the client with vLLM's own figures.

    Async scheduling keeps steps in flight. The mixin then sets vLLM's `defer_block_free`: a freed block counts as in
    use until the steps that may write to it have ended.
    """

    if TYPE_CHECKING:  # attributes of the scheduler that the class is mixed into
        kv_cache_manager: Any
        scheduler_config: Any
        vllm_config: Any
        running: list[Request]
        deferred_waiting: set[Request]
        get_request_counts: Callable[[], tuple[int, int]]
        prev_step_scheduled_req_ids: set[str]
        max_num_running_reqs: int
        max_model_len: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _elastic_pools():
            super().__init__(*args, **kwargs)
        self.pool: ElasticBlockPool = self.kv_cache_manager.block_pool
        self.after_step: Callable[[], None] | None = None
        self.work = Work()
        self.preemptions = 0
        self._last_step_ended_s = 0.0
        if self.vllm_config.max_concurrent_batches > 1:
            self.defer_block_free = True

    def set_limits(self, capacity: int, active_seqs: int, step_tokens: int) -> None:
        """Set the pool's capacity (blocks), the sequences that may run at once, and the tokens per step.

        Running requests continue, even if they exceed the new limits. With `active_seqs` 0, no request is admitted.
        vLLM's engine core then waits for its next call as if it were idle; with vLLM's own limit at 0 it would spin.
        """
        self.pool.set_capacity(capacity)
        self.kv_cache_manager.watermark_blocks = int(self.scheduler_config.watermark * capacity)
        # Not by set_pause_state, which would log a line at every change.
        self._pause_state = PauseState.UNPAUSED if active_seqs else PauseState.PAUSED_NEW
        self.max_num_active_reqs = active_seqs or self.max_num_running_reqs
        self.max_num_scheduled_tokens = step_tokens

    def preempt_draining(self) -> int:
        """Preempt every running request that holds a draining block, and return their number. vLLM recomputes them."""
        holders = [request for request in self.running if not self._block_ids(request).isdisjoint(self.pool.draining)]
        return self._preempt(holders)

    def preempt_running(self) -> int:
        """Preempt every running request, and return their number. vLLM recomputes them once it admits them again."""
        return self._preempt(list(self.running))

    def _preempt(self, requests: list[Request]) -> int:
        for request in reversed(requests):  # each goes to the front of the queue, so reversing keeps their order
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
            # vLLM may resume the request in the next step, and must not believe that it also ran in the last one.
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        return len(requests)

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        """Preempt a request as vLLM's Scheduler does, and count it. vLLM calls this too, when blocks run out."""
        self.preemptions += 1
        super()._preempt_request(*args, **kwargs)  # type: ignore[misc]

    def _block_ids(self, request: Request) -> set[int]:
        return {block for group in self.kv_cache_manager.get_block_ids(request.request_id) for block in group}

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step as vLLM's Scheduler does, and note when it began."""
        now_s = time.monotonic()
        step = super().schedule(*args, **kwargs)  # type: ignore[misc]
        step.troupe_began_s = now_s
        return step

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Count a step, process its output as vLLM's Scheduler does, then call `after_step`."""
        self._count(scheduler_output)
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self.after_step:
            self.after_step()
            self._refresh_counts(outputs)
        return outputs

    def _refresh_counts(self, outputs: Any) -> None:
        """Correct the figures that vLLM made before `after_step` may have preempted requests.

        While admission is paused, there may be no further step to report them.
        """
        running, waiting = self.get_request_counts()
        for output in outputs.values():
            if output.scheduler_stats is not None:
                output.scheduler_stats.num_running_reqs = running
                output.scheduler_stats.num_waiting_reqs = waiting - len(self.deferred_waiting)
                output.scheduler_stats.kv_cache_usage = self.kv_cache_manager.usage
                output.scheduler_stats.kv_connector_stats[PREEMPTIONS] = self.preemptions

    def _count(self, step: SchedulerOutput) -> None:
        """Add a step that has just ended to `work`.

        With async scheduling, a step is scheduled while the one before it runs: it begins when that one ends.
        """
        now_s = time.monotonic()
        began_s = max(step.troupe_began_s, self._last_step_ended_s)
        self._last_step_ended_s = now_s
        drafts = sum(map(len, step.scheduled_spec_decode_tokens.values()))
        tokens, sequences = step.total_num_scheduled_tokens - drafts, len(step.num_scheduled_tokens)
        if tokens:
            self.work = self.work.plus(now_s - began_s, sequences, tokens - sequences)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Return vLLM's figures with our counts in them. The field is free: only a connector's logger would read it."""
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            ours = {WORK: astuple(self.work), PREEMPTIONS: self.preemptions}
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), **ours}
        return stats


class ElasticScheduler(ElasticScheduling, Scheduler):  # type: ignore[misc]  # vLLM is not analysed
    """The scheduler for the CPU, where a step ends before the next one is scheduled."""


class ElasticAsyncScheduler(ElasticScheduling, AsyncScheduler):  # type: ignore[misc]  # vLLM is not analysed
    """The scheduler for CUDA, where vLLM schedules a step while the one before it runs."""


@contextmanager
def _elastic_pools() -> Iterator[None]:
    """Replace vLLM's BlockPool. Its KV cache coordinator looks the class up by this name and has no other hook."""
    stock = kv_cache_coordinator.BlockPool
    kv_cache_coordinator.BlockPool = ElasticBlockPool
    try:
        yield
    finally:
        kv_cache_coordinator.BlockPool = stock
