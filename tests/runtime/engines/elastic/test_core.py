"""Resizing between two steps: the real pool and CUDA pages over the stand-in driver, without an engine."""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engines.elastic.core import Resizer
from runtime.engines.elastic.layout import BlockLayout, Run
from runtime.engines.elastic.pages import Pages
from runtime.engines.elastic.pool import ElasticBlockPool
from runtime.engines.elastic.scheduler import ElasticScheduling
from runtime.engines.elastic.worker import ElasticWorker

MIB = 1 << 20
BLOCK, BLOCKS = 2 * MIB, 8


class Scheduler(ElasticScheduling):
    """The elastic scheduler's limits without the rest of vLLM's scheduler."""

    def __init__(self) -> None:
        self.pool = ElasticBlockPool(BLOCKS, enable_caching=False, hash_block_size=16)
        self.kv_cache_manager = SimpleNamespace(block_pool=self.pool)
        self.scheduler_config = SimpleNamespace(watermark=0.0)
        self.running = []
        self.after_step = None


class Worker(ElasticWorker):
    """An elastic worker whose cache is backed as far as its ceiling."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.layout = BlockLayout((Run(0, BLOCK),), BLOCKS, pages.granule)
        self.floor_blocks = 2
        self.back(BLOCKS)


def report(answer: Any) -> dict[str, Any]:
    return dict(answer.result(timeout=60) if isinstance(answer, Future) else answer)


@pytest.fixture
def worker(cuda: Callable[..., Pages]) -> Worker:
    return Worker(cuda(BLOCKS * BLOCK))


def test_a_shrink_waits_for_the_steps_that_are_queued_on_the_device(worker: Worker, driver: ctypes.CDLL) -> None:
    resizer = Resizer(Scheduler(), worker)
    driver.stub_hold(1)
    driver.stub_launch(worker.pages.address + 6 * BLOCK, BLOCK, 0)
    assert report(resizer.resize(4 * BLOCK, 8, 64, grace_s=0))["state"] == "applied"
    assert (driver.stub_queued(), driver.stub_in_use()) == (0, 4 * BLOCK)


def test_a_deferred_shrink_waits_for_the_last_step_of_the_blocks_that_were_in_use(
    worker: Worker, driver: ctypes.CDLL
) -> None:
    scheduler = Scheduler()
    resizer = Resizer(scheduler, worker)
    driver.stub_hold(1)
    used = scheduler.pool.get_new_blocks(5)
    driver.stub_launch(worker.pages.address + 7 * BLOCK, BLOCK, 0)
    assert report(resizer.resize(4 * BLOCK, 8, 64, grace_s=600)) == {
        "state": "deferred",
        "kv_cache_bytes": 4 * BLOCK,
        "held_bytes": 2 * BLOCK,
    }
    assert driver.stub_queued() == 0
    driver.stub_launch(worker.pages.address + 5 * BLOCK, BLOCK, 0)
    scheduler.pool.free_blocks(used)
    assert scheduler.after_step is not None
    scheduler.after_step()
    assert report(resizer.settled())["state"] == "applied"
    assert (driver.stub_queued(), driver.stub_in_use()) == (0, 4 * BLOCK)


def test_steps_that_follow_a_shrink_are_not_waited_for(worker: Worker, driver: ctypes.CDLL) -> None:
    resizer = Resizer(Scheduler(), worker)
    driver.stub_hold(1)
    resize = resizer.resize(4 * BLOCK, 8, 64, grace_s=0)
    driver.stub_launch(worker.pages.address, BLOCK, 0)
    assert report(resize)["state"] == "applied"
    assert driver.stub_queued() == 1
