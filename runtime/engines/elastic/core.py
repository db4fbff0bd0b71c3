"""Resizing an engine between two of its steps: what vLLM's engine core is taught, and calls on request.

Methods of EngineCore can be called from the client (`call_utility_async`); they run between steps. What they return
is plain data.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine.core import EngineCore

from runtime.engines.elastic.pages import OutOfMemory
from runtime.engines.elastic.scheduler import ElasticScheduling
from runtime.engines.elastic.worker import ElasticWorker

Report = dict[str, Any]


@dataclass
class _Shrink:
    """A shrink that waits for blocks to be let go; `ends_s` on time.perf_counter's clock."""

    blocks: int
    started_s: float
    ends_s: float
    report: Report
    finished: Future[Report] = field(default_factory=Future)


class Resizer:
    """One engine's scheduler and worker, and the shrink that is under way.

    Memory is given back in a thread: nobody uses it any more, and steps go on meanwhile.
    """

    def __init__(self, scheduler: ElasticScheduling, worker: ElasticWorker) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._shrink: _Shrink | None = None
        self._last: Future[Report] = Future()
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._released: Future[Any] | None = None

    def limits(self) -> Report:
        """What the engine holds and how far it can go; memory in bytes."""
        worker, config = self._worker, self._scheduler.scheduler_config
        return {
            "device_bytes": worker.device_bytes(),
            "device_uuid": worker.device_uuid(),
            "fixed_bytes": worker.fixed_bytes(),
            "kv_floor_bytes": worker.layout.backed_bytes(worker.floor_blocks),
            "kv_ceiling_bytes": worker.layout.backed_bytes(worker.layout.blocks),
            "seqs_ceiling": self._scheduler.max_num_running_reqs,
            "step_tokens_floor": 1 if config.enable_chunked_prefill else self._scheduler.max_model_len,
            "step_tokens_ceiling": config.max_num_batched_tokens,
            "block_bytes": sum(run.stride for run in worker.layout.runs),
            "block_tokens": self._scheduler.vllm_config.cache_config.block_size,
        }

    def resize(
        self, kv_cache_bytes: int, active_seqs: int, step_tokens: int, grace_s: float
    ) -> Report | Future[Report]:
        """Move to the most blocks that `kv_cache_bytes` back. The report's "state" is applied, deferred or refused.

        Its "seconds" are until all is done, its "stall_seconds" what the engine's steps had to wait.
        """
        started = time.perf_counter()
        if self._released:
            self._released.result()
        blocks = self._worker.layout.capacity(kv_cache_bytes)
        if blocks < self._worker.floor_blocks:
            return {"state": "refused", "reason": f"{kv_cache_bytes} bytes are below the floor"}
        report: Report = {"state": "applied", "kv_cache_bytes": self._worker.layout.backed_bytes(blocks)}
        report |= {"moved_bytes": 0, "preempted": 0, "stall_seconds": 0.0}
        if blocks > self._worker.backed_blocks:
            try:
                report["moved_bytes"] = self._worker.back(blocks)
            except OutOfMemory as error:
                return {"state": "refused", "reason": str(error)}
        self._supersede()
        self._scheduler.set_limits(blocks, active_seqs, step_tokens)
        if blocks < self._worker.backed_blocks:
            report["stall_seconds"] = time.perf_counter() - started
            self._shrink = shrink = _Shrink(blocks, started, started + grace_s, report)
            self._scheduler.after_step = self._go_on
            self._go_on()
            if self._shrink is not None:
                self._last = shrink.finished
                free_from = max(self._scheduler.pool.draining) + 1
                return self._give_back(self._release_what_is_free, free_from, shrink)
            return shrink.finished
        report["seconds"] = report["stall_seconds"] = time.perf_counter() - started
        return report

    def settled(self) -> Future[Report]:
        """How the shrink that was last deferred ended: its report, or {"state": "superseded"}."""
        return self._last

    def _supersede(self) -> None:
        shrink, self._shrink = self._shrink, None
        self._scheduler.after_step = None
        if shrink:
            shrink.finished.set_result({"state": "superseded"})

    def _go_on(self) -> None:
        """Give the memory back once nobody uses it; after the grace, see to it that nobody does."""
        shrink = self._shrink
        if shrink is None:
            return
        begun = time.perf_counter()
        if self._scheduler.pool.draining and begun >= shrink.ends_s:
            shrink.report["preempted"] += self._scheduler.preempt_drainers()
        shrink.report["stall_seconds"] += time.perf_counter() - begun
        if not self._scheduler.pool.draining:
            self._shrink = self._scheduler.after_step = None
            self._give_back(self._release, shrink)

    def _give_back(self, release: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run `release` in the releasing thread; it waits for the steps that the device has been given up to now."""
        self._worker.pages.fence()
        self._released = released = self._releaser.submit(release, *arguments)
        return released

    def _release_what_is_free(self, blocks: int, shrink: _Shrink) -> Report:
        """In the releasing thread: give back all above the highest block in use; what is held then is exact."""
        if blocks < self._worker.backed_blocks:
            shrink.report["moved_bytes"] += self._worker.back(blocks)
        held = self._worker.layout.backed_bytes(self._worker.backed_blocks) - shrink.report["kv_cache_bytes"]
        return {"state": "deferred", "kv_cache_bytes": shrink.report["kv_cache_bytes"], "held_bytes": held}

    def _release(self, shrink: _Shrink) -> int:
        """In the releasing thread. What goes wrong is the caller's answer, and raised again at the next resize."""
        try:
            moved = self._worker.back(shrink.blocks)
            shrink.report["moved_bytes"] += moved
        except BaseException as error:
            shrink.finished.set_exception(error)
            raise
        shrink.report["seconds"] = time.perf_counter() - shrink.started_s
        shrink.finished.set_result(shrink.report)
        return moved


def _resizer(core: EngineCore) -> Resizer:
    if not hasattr(core, "_troupe_resizer"):
        core._troupe_resizer = Resizer(core.scheduler, core.model_executor.driver_worker.worker)
    return core._troupe_resizer  # type: ignore[no-any-return]  # vLLM is not analysed


def _limits(core: EngineCore) -> Report:
    return _resizer(core).limits()


def _resize(
    core: EngineCore, kv_cache_bytes: int, active_seqs: int, step_tokens: int, grace_s: float
) -> Report | Future[Report]:
    return _resizer(core).resize(kv_cache_bytes, active_seqs, step_tokens, grace_s)


def _settled(core: EngineCore) -> Future[Report]:
    return _resizer(core).settled()


def install() -> None:
    """Give this process's EngineCore the methods `troupe_limits`, `troupe_resize` and `troupe_settled`.

    Done where an elastic engine is made, and not by a vLLM plug-in: those change every vLLM process of the
    environment, our users' own too.
    """
    EngineCore.troupe_limits, EngineCore.troupe_resize, EngineCore.troupe_settled = _limits, _resize, _settled
