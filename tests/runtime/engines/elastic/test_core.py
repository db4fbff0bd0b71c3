"""Tests of a resize with the real block pool and CUDA pages over the stub driver, without an engine."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from runtime.engines.elastic.core import Resizer
from runtime.engines.elastic.layout import BlockLayout, Run
from runtime.engines.elastic.pages import Pages
from runtime.engines.elastic.pool import ElasticBlockPool
from runtime.engines.elastic.reports import ResizeApplied, ResizeDeferred, ResizeRefused, ResizeSuperseded
from runtime.engines.elastic.scheduler import ElasticScheduling
from runtime.engines.elastic.worker import ElasticWorker
from tests.runtime.engines.elastic.test_block_tables import block_tables_on_the_host

MIB = 1 << 20
BLOCK, BLOCKS = 2 * MIB, 8
FLOOR_BLOCKS = 2
WEIGHTS = 3 * BLOCK
LONG_S = 60
"""Bounds waits for the release thread on a busy machine."""


class Scheduler(ElasticScheduling):
    """The elastic scheduler's limits without the rest of vLLM's scheduler."""

    def __init__(self) -> None:
        self.pool = ElasticBlockPool(BLOCKS, enable_caching=True, hash_block_size=16)
        self.kv_cache_manager = SimpleNamespace(block_pool=self.pool)
        self.scheduler_config = SimpleNamespace(watermark=0.0, max_num_batched_tokens=64)
        self.running = []
        self.waiting = 0
        self.max_num_running_reqs = 8
        self.max_num_scheduled_tokens = 64
        self.get_request_counts = lambda: (len(self.running), self.waiting)
        self.after_step = None


class Worker(ElasticWorker):
    """An elastic worker whose KV cache is backed up to its ceiling, and whose weights are three granules."""

    local_rank = 0
    use_v2_model_runner = True
    fixed, device, uuid = 10, 100, ""

    def fixed_bytes(self) -> int:
        return self.fixed

    def device_bytes(self) -> int:
        return self.device

    def device_uuid(self) -> str:
        return self.uuid

    def copy_bytes(self) -> int:
        return WEIGHTS

    def __init__(self, pages: Pages, weights: Pages, keeps_kv: bool = False) -> None:
        self.vllm_config = SimpleNamespace(troupe_settings=SimpleNamespace(sleep_keeps_kv=keeps_kv))
        tables = block_tables_on_the_host([16], 64, [BLOCKS])
        self.model_runner = SimpleNamespace(block_tables=tables)
        self.row = tables.block_tables[0].gpu[0]
        self.weights = weights
        self.weights.back(0, WEIGHTS)
        self.pages = pages
        self.layout = BlockLayout((Run(0, BLOCK),), BLOCKS, pages.granule_bytes)
        self.floor_blocks = FLOOR_BLOCKS
        self.back(BLOCKS)

    def release_weights(self) -> int:
        self.weights.release(0, WEIGHTS)
        return WEIGHTS

    def restore_weights(self) -> int:
        self.weights.back(0, WEIGHTS)
        return WEIGHTS


@pytest.fixture
def worker(cuda: Callable[..., Pages]) -> Worker:
    return Worker(cuda(BLOCKS * BLOCK), cuda(WEIGHTS))


def test_shrink_waits_for_steps_queued_on_the_device(worker: Worker, driver: ctypes.CDLL) -> None:
    resizer = Resizer(Scheduler(), worker)
    driver.stub_hold(1)
    driver.stub_launch(worker.pages.address + 6 * BLOCK, BLOCK, 0)
    assert isinstance(resizer.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S), ResizeApplied)
    assert (driver.stub_queued(), driver.stub_in_use() - WEIGHTS) == (0, 4 * BLOCK)


def test_deferred_shrink_waits_for_the_last_step_of_its_draining_blocks(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    driver.stub_hold(1)
    used = scheduler.pool.get_new_blocks(5)
    driver.stub_launch(worker.pages.address + 7 * BLOCK, BLOCK, 0)
    report = resizer.resize(4 * BLOCK, 8, 64, grace_s=600).result(LONG_S)
    assert report == ResizeDeferred(kv_cache_bytes=4 * BLOCK, held_bytes=2 * BLOCK)
    assert driver.stub_queued() == 0
    driver.stub_launch(worker.pages.address + 5 * BLOCK, BLOCK, 0)
    scheduler.pool.free_blocks(used)
    assert scheduler.after_step is not None
    scheduler.after_step()
    assert isinstance(resizer.settled().result(LONG_S), ResizeApplied)
    assert (driver.stub_queued(), driver.stub_in_use() - WEIGHTS) == (0, 4 * BLOCK)


def test_steps_after_a_shrink_read_no_released_block(worker: Worker) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    outside, inside = scheduler.pool.get_new_blocks(5), scheduler.pool.get_new_blocks(1)
    worker.row[:6] = torch.tensor([block.block_id for block in outside + inside])
    scheduler.pool.free_blocks(outside)  # a sliding window has passed them, and the request runs on
    assert isinstance(resizer.resize(4 * BLOCK, 8, 64, grace_s=600).result(LONG_S), ResizeDeferred)
    assert worker.row.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]  # block 6 is in use, so those below it have memory
    scheduler.pool.free_blocks(inside)
    assert scheduler.after_step is not None
    scheduler.after_step()
    assert worker.row.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert isinstance(resizer.settled().result(LONG_S), ResizeApplied)


def test_shrink_does_not_wait_for_later_steps(worker: Worker, driver: ctypes.CDLL) -> None:
    resizer = Resizer(Scheduler(), worker)
    driver.stub_hold(1)
    resize = resizer.resize(4 * BLOCK, 8, 64, grace_s=0)
    driver.stub_launch(worker.pages.address, BLOCK, 0)
    assert isinstance(resize.result(LONG_S), ResizeApplied)
    assert driver.stub_queued() == 1


def test_grow_supersedes_a_deferred_shrink(worker: Worker) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    scheduler.pool.get_new_blocks(5)
    assert isinstance(resizer.resize(4 * BLOCK, 8, 64, grace_s=600).result(LONG_S), ResizeDeferred)
    grown = resizer.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    assert isinstance(grown, ResizeApplied)
    assert (grown.kv_cache_bytes, grown.moved_bytes) == (BLOCKS * BLOCK, 2 * BLOCK)
    assert isinstance(resizer.settled().result(LONG_S), ResizeSuperseded)
    assert scheduler.after_step is None


def test_resize_below_the_floor_is_refused_and_changes_nothing(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    report = resizer.resize(BLOCK, 8, 64, grace_s=0).result(LONG_S)
    reason = f"{BLOCK} bytes are below the floor of {FLOOR_BLOCKS * BLOCK} bytes"
    assert report == ResizeRefused(reason)
    assert (scheduler.pool.num_gpu_blocks, driver.stub_in_use()) == (BLOCKS, WEIGHTS + BLOCKS * BLOCK)


def test_grow_without_free_memory_is_refused_and_changes_nothing(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    resizer.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    driver.stub_set_limit(WEIGHTS + 6 * BLOCK)
    report = resizer.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    assert isinstance(report, ResizeRefused)
    assert "out of memory" in report.reason
    assert (scheduler.pool.num_gpu_blocks, driver.stub_in_use()) == (4, WEIGHTS + 4 * BLOCK)


@pytest.mark.parametrize("keeps_kv", [False, True])
def test_a_sleeping_engine_keeps_at_most_the_smallest_kv_cache(
    keeps_kv: bool, cuda: Callable[..., Pages], driver: ctypes.CDLL
) -> None:
    worker, scheduler = Worker(cuda(BLOCKS * BLOCK), cuda(WEIGHTS), keeps_kv), Scheduler()
    resizer = Resizer(scheduler, worker)
    driver.stub_hold(1)
    driver.stub_launch(worker.pages.address + BLOCK, BLOCK, 0)
    kept = FLOOR_BLOCKS * BLOCK if keeps_kv else 0
    slept = resizer.sleep().result(LONG_S)
    assert isinstance(slept, ResizeApplied)
    assert (slept.kv_cache_bytes, slept.moved_bytes) == (kept, WEIGHTS + BLOCKS * BLOCK - kept)
    assert (driver.stub_queued(), driver.stub_in_use()) == (0, kept)
    assert scheduler.max_num_active_reqs == 8
    assert scheduler._pause_state.name == "PAUSED_NEW"
    assert isinstance(resizer.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S), ResizeRefused)
    assert resizer.sleep().result(LONG_S) == ResizeRefused("the engine sleeps already")
    woken = resizer.wake()
    assert isinstance(woken, ResizeApplied)
    assert (woken.kv_cache_bytes, driver.stub_in_use()) == (FLOOR_BLOCKS * BLOCK, WEIGHTS + FLOOR_BLOCKS * BLOCK)
    assert (scheduler.pool.num_gpu_blocks, scheduler._pause_state.name) == (FLOOR_BLOCKS, "UNPAUSED")
    assert resizer.wake() == ResizeRefused("the engine does not sleep")
    grown = resizer.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    assert isinstance(grown, ResizeApplied)


def test_an_engine_with_unfinished_requests_does_not_sleep(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler, before = Scheduler(), driver.stub_in_use()
    scheduler.waiting = 1
    assert Resizer(scheduler, worker).sleep().result(LONG_S) == ResizeRefused("requests are unfinished")
    assert driver.stub_in_use() == before


def test_sleep_waits_for_the_steps_in_flight_of_an_aborted_request(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler, before = Scheduler(), driver.stub_in_use()
    used = scheduler.pool.get_new_blocks(1)
    slept = Resizer(scheduler, worker).sleep()
    assert scheduler.after_step is not None
    scheduler.after_step()
    assert (slept.done(), driver.stub_in_use()) == (False, before)
    scheduler.pool.free_blocks(used)
    scheduler.after_step()
    assert isinstance(slept.result(LONG_S), ResizeApplied)
    assert driver.stub_in_use() == 0


def test_an_engine_whose_device_fails_refuses_to_sleep(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("cuEventRecord: CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(worker.pages, "fence", fail)
    slept = Resizer(Scheduler(), worker).sleep().result(LONG_S)
    assert slept == ResizeRefused("cuEventRecord: CUDA_ERROR_ILLEGAL_ADDRESS")


def test_an_engine_that_cannot_take_its_memory_back_refuses_to_wake(worker: Worker, driver: ctypes.CDLL) -> None:
    resizer = Resizer(Scheduler(), worker)
    resizer.sleep().result(LONG_S)
    driver.stub_set_limit(WEIGHTS + BLOCK)
    assert resizer.wake() == ResizeRefused("cuMemCreate: the GPU is out of memory")


def test_a_sleep_supersedes_a_deferred_shrink(worker: Worker, driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    used = scheduler.pool.get_new_blocks(5)
    assert isinstance(resizer.resize(4 * BLOCK, 8, 64, grace_s=600).result(LONG_S), ResizeDeferred)
    scheduler.pool.free_blocks(used)
    assert isinstance(resizer.sleep().result(LONG_S), ResizeApplied)
    assert isinstance(resizer.settled().result(LONG_S), ResizeSuperseded)
    assert driver.stub_in_use() == 0
