"""Resizes an engine, puts it to sleep and wakes it, between two of its steps and in the engine core's process.

vLLM's client calls the methods that `install` adds to EngineCore with `call_utility_async`. The engine core runs them
between two steps. It sends their results as plain data: see `reports`.

README.md lists what happens during a resize, in order.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from runtime.engines.elastic.pages import OutOfMemory
from runtime.engines.elastic.ranks import InPlace, Ranks
from runtime.engines.elastic.reports import (
    ResizeApplied,
    ResizeDeferred,
    ResizeRefused,
    ResizeReport,
    ResizeSuperseded,
)
from runtime.engines.elastic.scheduler import ElasticScheduling
from runtime.engines.elastic.worker import ElasticWorker
from runtime.engines.grant import EngineLimits

T = TypeVar("T")


@dataclass
class _Shrink:
    """A shrink to `capacity` blocks that is under way, and its figures so far.

    Times on the clock of time.perf_counter. `deadline_s` is the end of the grace period: from then on, requests that
    hold draining blocks are preempted.
    """

    capacity: int
    kv_cache_bytes: int
    started_s: float
    deadline_s: float
    stall_seconds: float
    moved_bytes: int = 0
    preempted: int = 0
    finished: Future[ResizeReport] = field(default_factory=Future)


class Resizer:
    """The resizing of one engine: its scheduler's limits, and the memory behind its worker's KV cache.

    A thread releases memory while steps run, because no step can touch that memory any more. An executor in
    `release_in` takes the place of this thread.
    """

    def __init__(
        self, scheduler: ElasticScheduling, worker: ElasticWorker | Ranks, release_in: Executor | None = None
    ) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._shrink: _Shrink | None = None
        self._last_deferred: Future[ResizeReport] = Future()
        self._releases_between_steps = release_in is not None
        self._release_in = release_in or ThreadPoolExecutor(1, thread_name_prefix="release")
        self._last_release: Future[Any] | None = None
        self._asleep = False

    def limits(self) -> EngineLimits:
        """Return what the engine holds besides its KV cache, and the bounds of its grants."""
        worker, config = self._worker, self._scheduler.scheduler_config
        figures = worker.figures()
        return EngineLimits(
            device_bytes=figures.device_bytes,
            device_uuids=figures.device_uuids,
            fixed_bytes=figures.fixed_bytes,
            kv_floor_bytes=worker.layout.backed_bytes(worker.floor_blocks),
            kv_ceiling_bytes=worker.layout.backed_bytes(worker.layout.blocks),
            seqs_ceiling=self._scheduler.max_num_running_reqs,
            step_tokens_floor=1 if config.enable_chunked_prefill else self._scheduler.max_model_len,
            step_tokens_ceiling=config.max_num_batched_tokens,
            block_bytes=sum(run.stride for run in worker.layout.runs),
            block_tokens=self._scheduler.vllm_config.cache_config.block_size,
            asleep_bytes=figures.asleep_bytes,
            copy_bytes=figures.copy_bytes,
            gpus=worker.gpus,
        )

    def resize(
        self, kv_cache_bytes: int, active_seqs: int, step_tokens: int, grace_s: float, preempt: bool = False
    ) -> Future[ResizeReport]:
        """Resize the KV cache to the most blocks that `kv_cache_bytes` can back, and set both scheduler limits.

        With `preempt`, preempt all running requests first.

        Return a future of ResizeApplied, ResizeDeferred or ResizeRefused. A shrink is deferred if blocks above the new
        capacity are still in use: by requests, for up to `grace_s` seconds, or by a step in flight. `settled` then
        returns how it ended.

        Waits for the previous release, and raises its error if it failed.
        """
        started_s = time.perf_counter()
        if self._asleep:
            return _completed(ResizeRefused("the engine sleeps"))
        self._wait_for_release()
        capacity = self._worker.layout.capacity(kv_cache_bytes)
        if capacity < self._worker.floor_blocks:
            floor_bytes = self._worker.layout.backed_bytes(self._worker.floor_blocks)
            return _completed(ResizeRefused(f"{kv_cache_bytes} bytes are below the floor of {floor_bytes} bytes"))
        try:
            moved_bytes = self._worker.back(max(capacity, self._worker.backed_blocks))
        except OutOfMemory as error:
            return _completed(ResizeRefused(str(error)))
        self._supersede_shrink()
        self._scheduler.set_limits(capacity, active_seqs, step_tokens)
        preempted = self._scheduler.preempt_running() if preempt else 0
        if capacity < self._worker.backed_blocks:
            return self._start_shrink(capacity, started_s, grace_s, preempted)
        held_bytes = self._worker.layout.backed_bytes(capacity)
        seconds = time.perf_counter() - started_s
        return _completed(ResizeApplied(held_bytes, moved_bytes, seconds, stall_seconds=seconds, preempted=preempted))

    def sleep(self) -> Future[ResizeReport]:
        """Release the weights and the KV cache. They stay released until `wake`; admission is paused meanwhile.

        Return a future of ResizeApplied or ResizeRefused. It waits for steps in flight that still use blocks. With
        `sleep_keeps_kv`, the smallest KV cache stays, with the prefixes in it.

        Refuses if requests are unfinished, if the host has too little memory for the weights, or if the device fails.
        Close an engine that refuses.
        """
        started_s = time.perf_counter()
        if self._asleep:
            return _completed(ResizeRefused("the engine sleeps already"))
        if any(self._scheduler.get_request_counts()):
            return _completed(ResizeRefused("requests are unfinished"))
        self._supersede_shrink()
        slept: Future[ResizeReport] = Future()
        self._scheduler.after_step = lambda: self._sleep_once_unused(slept, started_s)
        self._scheduler.after_step()
        return slept

    def _sleep_once_unused(self, slept: Future[ResizeReport], started_s: float) -> None:
        """Fall asleep if no step uses a block any more. The scheduler calls this after every step until then.

        With async scheduling, the blocks of a request that was aborted are in use until the steps in flight have ended.
        """
        if self._scheduler.pool.in_use:
            return
        self._scheduler.after_step = None
        try:
            slept.set_result(self._moved(self._fall_asleep(), started_s))
        except (OutOfMemory, RuntimeError) as error:
            slept.set_result(ResizeRefused(str(error)))

    def _fall_asleep(self) -> int:
        """Release the weights and the KV cache, and return the bytes released."""
        worker = self._worker
        self._wait_for_release()
        released_bytes = worker.release_weights()
        if not worker.blocks_asleep:
            self._scheduler.pool.reset_prefix_cache()
        self._scheduler.set_limits(worker.floor_blocks, 0, self._scheduler.max_num_scheduled_tokens)
        worker.fence(worker.blocks_asleep)
        released_bytes += worker.back(worker.blocks_asleep)
        self._asleep = True
        return released_bytes

    def wake(self) -> ResizeReport:
        """Take the weights and the smallest KV cache back, and admit requests again with full concurrency.

        Refuses if the device has too little free memory or fails. Close an engine that refuses.
        """
        started_s = time.perf_counter()
        if not self._asleep:
            return ResizeRefused("the engine does not sleep")
        worker, config = self._worker, self._scheduler.scheduler_config
        try:
            moved_bytes = worker.restore_weights() + worker.back(worker.floor_blocks)
        except (OutOfMemory, RuntimeError) as error:
            return ResizeRefused(str(error))
        self._scheduler.set_limits(
            worker.floor_blocks, self._scheduler.max_num_running_reqs, config.max_num_batched_tokens
        )
        self._asleep = False
        return self._moved(moved_bytes, started_s)

    def _moved(self, moved_bytes: int, started_s: float) -> ResizeApplied:
        kv_cache_bytes = self._worker.layout.backed_bytes(self._worker.backed_blocks)
        seconds = time.perf_counter() - started_s
        return ResizeApplied(kv_cache_bytes, moved_bytes, seconds, stall_seconds=seconds, preempted=0)

    def _wait_for_release(self) -> None:
        """Wait for the previous release, and raise its error if it failed."""
        if self._last_release is not None:
            self._last_release.result()

    def settled(self) -> Future[ResizeReport]:
        """Return a future of how the last deferred shrink ends: ResizeApplied or ResizeSuperseded."""
        return self._last_deferred

    def _supersede_shrink(self) -> None:
        shrink, self._shrink = self._shrink, None
        self._scheduler.after_step = None
        if shrink is not None:
            shrink.finished.set_result(ResizeSuperseded())

    def _start_shrink(self, capacity: int, started_s: float, grace_s: float, preempted: int) -> Future[ResizeReport]:
        """Release the blocks above `capacity`, now if they are free, otherwise once they are."""
        kv_cache_bytes = self._worker.layout.backed_bytes(capacity)
        stall_seconds = time.perf_counter() - started_s
        shrink = _Shrink(capacity, kv_cache_bytes, started_s, started_s + grace_s, stall_seconds, preempted=preempted)
        self._shrink = shrink
        self._scheduler.after_step = self._continue_shrink
        self._continue_shrink()
        if self._shrink is None:
            return shrink.finished
        self._last_deferred = shrink.finished
        unused_from = max(self._scheduler.pool.draining) + 1
        return self._release(unused_from, self._release_unused, shrink)

    def _continue_shrink(self) -> None:
        """Release the memory if no request holds it any more; preempt those that do if the grace period is over.

        The scheduler calls this after every step while a shrink is under way.
        """
        shrink = self._shrink
        if shrink is None:
            return
        pool = self._scheduler.pool
        now_s = time.perf_counter()
        if pool.draining and now_s >= shrink.deadline_s:
            shrink.preempted += self._scheduler.preempt_draining()
        shrink.stall_seconds += time.perf_counter() - now_s
        if not pool.draining:
            self._shrink = self._scheduler.after_step = None
            self._release(shrink.capacity, self._finish_shrink, shrink)

    def _release(self, blocks: int, release: Callable[[_Shrink, int], T], shrink: _Shrink) -> Future[T]:
        """Run `release`, in the release thread or its substitute, after the steps that the device has been given.

        It may release the blocks from `blocks` up.
        """
        self._worker.fence(blocks)
        future = self._release_in.submit(release, shrink, blocks)
        self._last_release = future
        return future

    def _release_unused(self, shrink: _Shrink, unused_from: int) -> ResizeReport:
        """Release the blocks from `unused_from` up, above the highest block in use, and report what is still held.

        Runs in the release thread or its substitute.
        """
        if unused_from < self._worker.backed_blocks:
            shrink.moved_bytes += self._worker.back(unused_from)
        held_bytes = self._worker.layout.backed_bytes(self._worker.backed_blocks) - shrink.kv_cache_bytes
        return ResizeDeferred(shrink.kv_cache_bytes, held_bytes)

    def _finish_shrink(self, shrink: _Shrink, capacity: int) -> None:
        """Release all blocks above the new capacity and report the shrink as applied.

        Runs in the release thread or its substitute. An error reaches the caller of the shrink, and `resize` raises it
        again.
        """
        began_s = time.perf_counter()
        try:
            shrink.moved_bytes += self._worker.back(capacity)
        except BaseException as error:
            shrink.finished.set_exception(error)
            raise
        if self._releases_between_steps:
            shrink.stall_seconds += time.perf_counter() - began_s
        seconds = time.perf_counter() - shrink.started_s
        shrink.finished.set_result(
            ResizeApplied(shrink.kv_cache_bytes, shrink.moved_bytes, seconds, shrink.stall_seconds, shrink.preempted)
        )


def _completed(report: ResizeReport) -> Future[ResizeReport]:
    future: Future[ResizeReport] = Future()
    future.set_result(report)
    return future


def _resizer(core: EngineCore) -> Resizer:
    if not hasattr(core, "_troupe_resizer"):
        executor = core.model_executor
        core._troupe_resizer = (
            Resizer(core.scheduler, Ranks(executor), InPlace())
            if isinstance(executor, MultiprocExecutor)
            else Resizer(core.scheduler, executor.driver_worker.worker)
        )
    return core._troupe_resizer  # type: ignore[no-any-return]  # vLLM is not analysed


def _limits(core: EngineCore) -> EngineLimits:
    return _resizer(core).limits()


def _resize(
    core: EngineCore, kv_cache_bytes: int, active_seqs: int, step_tokens: int, grace_s: float, preempt: bool = False
) -> Future[ResizeReport]:
    return _resizer(core).resize(kv_cache_bytes, active_seqs, step_tokens, grace_s, preempt)


def _settled(core: EngineCore) -> Future[ResizeReport]:
    return _resizer(core).settled()


def _sleep(core: EngineCore) -> Future[ResizeReport]:
    return _resizer(core).sleep()


def _wake(core: EngineCore) -> ResizeReport:
    return _resizer(core).wake()


def install() -> None:
    """Add Troupe's methods, whose names begin with `troupe_`, to this process's EngineCore.

    The executor of an elastic engine calls this. A vLLM plug-in would change every vLLM process of the environment,
    including those that have nothing to do with Troupe.
    """
    EngineCore.troupe_limits, EngineCore.troupe_resize, EngineCore.troupe_settled = _limits, _resize, _settled
    EngineCore.troupe_sleep, EngineCore.troupe_wake = _sleep, _wake
