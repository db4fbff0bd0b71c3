"""Two ranks with CUDA pages over the stub driver are resized, put to sleep and woken as one worker."""

import ctypes
import pickle
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.engines.elastic.core import Resizer
from runtime.engines.elastic.layout import BlockLayout, Run
from runtime.engines.elastic.pages import Pages
from runtime.engines.elastic.ranks import InPlace, Ranks
from runtime.engines.elastic.reports import ResizeApplied, ResizeDeferred, ResizeRefused
from tests.runtime.engines.elastic.test_core import BLOCK, BLOCKS, FLOOR_BLOCKS, LONG_S, WEIGHTS, Scheduler, Worker


class Executor:
    """Calls functions as vLLM's MultiprocExecutor does, with workers of this process."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.queues: list[deque[bytes]] = [deque() for _ in workers]

    def collective_rpc(self, function: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[Any]:
        sent = pickle.dumps((function, args))
        for worker, answers in zip(self.workers, self.queues, strict=True):
            called, arguments = pickle.loads(sent)
            answers.append(pickle.dumps(called(SimpleNamespace(worker=worker), *arguments)))
        results = []
        for answers in self.queues:  # an error leaves the later ranks' answers in their queues
            results.append(pickle.loads(answers.popleft()))
            if isinstance(results[-1], Exception):
                raise RuntimeError(f"Worker failed with error '{results[-1]}'")
        return results


@pytest.fixture
def workers(cuda: Callable[..., Pages]) -> list[Worker]:
    made = [Worker(cuda(BLOCKS * BLOCK), cuda(WEIGHTS)) for _ in range(2)]
    for number, worker in enumerate(made):
        worker.local_rank = number
        worker.fixed, worker.device, worker.uuid = 10 + number, 100 - number, f"u{number}"
    return made


def resizer(scheduler: Scheduler, workers: list[Worker]) -> Resizer:
    return Resizer(scheduler, Ranks(Executor(workers)), InPlace())


def backed(workers: list[Worker]) -> list[int]:
    return [worker.backed_blocks for worker in workers]


def test_ranks_begin_with_the_largest_floor_of_any(workers: list[Worker]) -> None:
    workers[1].floor_blocks = FLOOR_BLOCKS + 1
    assert Ranks(Executor(workers)).floor_blocks == FLOOR_BLOCKS + 1
    assert backed(workers) == [FLOOR_BLOCKS + 1] * 2


def test_ranks_with_different_layouts_are_refused(workers: list[Worker]) -> None:
    workers[1].layout = BlockLayout((Run(0, 2 * BLOCK),), BLOCKS // 2, BLOCK)
    with pytest.raises(RuntimeError, match="lay their KV caches out differently"):
        Ranks(Executor(workers))


def test_all_ranks_back_and_release_the_same_blocks(workers: list[Worker], driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizing = resizer(scheduler, workers)
    for blocks in (6, 3, BLOCKS):
        report = resizing.resize(blocks * BLOCK, 8, 64, grace_s=0).result(LONG_S)
        assert isinstance(report, ResizeApplied)
        assert report.kv_cache_bytes == blocks * BLOCK
        assert (backed(workers), scheduler.pool.num_gpu_blocks) == ([blocks, blocks], blocks)
        assert driver.stub_in_use() == 2 * (WEIGHTS + blocks * BLOCK)


def test_a_release_waits_for_the_steps_of_each_rank(workers: list[Worker], driver: ctypes.CDLL) -> None:
    resizing = resizer(Scheduler(), workers)
    resizing.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    driver.stub_hold(1)
    for worker in workers:
        driver.stub_launch(worker.pages.address + 6 * BLOCK, BLOCK, 0)
    assert isinstance(resizing.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S), ResizeApplied)
    assert (driver.stub_queued(), backed(workers)) == (0, [4, 4])


def test_no_rank_reads_released_blocks_after_a_shrink(workers: list[Worker]) -> None:
    resizing = resizer(Scheduler(), workers)
    resizing.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    for worker in workers:
        worker.row[:4] = torch.tensor([7, 3, 4, 2])
    resizing.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    assert [worker.row[:4].tolist() for worker in workers] == [[0, 3, 0, 2]] * 2


def test_a_deferred_shrink_ends_when_no_rank_needs_its_blocks(workers: list[Worker]) -> None:
    scheduler = Scheduler()
    resizing = resizer(scheduler, workers)
    resizing.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    used = scheduler.pool.get_new_blocks(5)
    report = resizing.resize(4 * BLOCK, 8, 64, grace_s=600).result(LONG_S)
    assert report == ResizeDeferred(kv_cache_bytes=4 * BLOCK, held_bytes=2 * BLOCK)
    assert backed(workers) == [6, 6]
    scheduler.pool.free_blocks(used)
    assert scheduler.after_step is not None
    scheduler.after_step()
    assert isinstance(resizing.settled().result(LONG_S), ResizeApplied)
    assert backed(workers) == [4, 4]


def test_if_one_rank_is_out_of_memory_none_grows(workers: list[Worker], driver: ctypes.CDLL) -> None:
    scheduler = Scheduler()
    resizing = resizer(scheduler, workers)
    resizing.resize(4 * BLOCK, 8, 64, grace_s=0).result(LONG_S)
    before = driver.stub_in_use()
    for memory, reason in ((4 * BLOCK, "device 1 of the group: "), (0, "device 0 of the group: ")):
        driver.stub_set_limit(before + memory)  # enough for the first rank, then for none
        report = resizing.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S)
        assert isinstance(report, ResizeRefused)
        assert report.reason.startswith(reason)
        assert (backed(workers), driver.stub_in_use(), scheduler.pool.num_gpu_blocks) == ([4, 4], before, 4)
    driver.stub_set_limit(before + 8 * BLOCK)
    assert isinstance(resizing.resize(BLOCKS * BLOCK, 8, 64, grace_s=0).result(LONG_S), ResizeApplied)
    assert backed(workers) == [BLOCKS, BLOCKS]


def test_limits_are_those_of_the_rank_that_leaves_least(workers: list[Worker]) -> None:
    limits = resizer(Scheduler(), workers)
    for worker in workers:
        worker.vllm_config.cache_config = SimpleNamespace(block_size=16)
    limits._scheduler.scheduler_config.enable_chunked_prefill = True
    limits._scheduler.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
    found = limits.limits()
    assert (found.device_bytes, found.fixed_bytes, found.device_uuids) == (99, 11, ("u0", "u1"))
    assert (found.copy_bytes, found.kv_ceiling_bytes) == (2 * WEIGHTS, BLOCKS * BLOCK)


def test_all_ranks_sleep_and_wake(workers: list[Worker], driver: ctypes.CDLL) -> None:
    resizing = resizer(Scheduler(), workers)
    assert isinstance(resizing.sleep().result(LONG_S), ResizeApplied)
    assert driver.stub_in_use() == 0
    driver.stub_set_limit(2 * WEIGHTS + 3 * BLOCK)
    assert resizing.wake() == ResizeRefused("device 1 of the group: cuMemCreate: the GPU is out of memory")


def test_ranks_that_can_take_their_memory_back_wake(workers: list[Worker], driver: ctypes.CDLL) -> None:
    resizing = resizer(Scheduler(), workers)
    resizing.sleep().result(LONG_S)
    assert isinstance(resizing.wake(), ResizeApplied)
    assert driver.stub_in_use() == 2 * (WEIGHTS + FLOOR_BLOCKS * BLOCK)
