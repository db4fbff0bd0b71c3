"""The workers of an engine whose model is spread over several devices (tensor parallelism), as one worker.

All ranks back and release the same blocks, between the same two steps: the engine core sends them the change in the
queue that also carries the steps, and waits until each has made it.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, ParamSpec, TypeVar

from runtime.engines.elastic.layout import BlockLayout
from runtime.engines.elastic.pages import OutOfMemory
from runtime.engines.elastic.worker import ElasticWorker, Figures

P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """A worker that stands for all ranks of an engine, for a Resizer. Byte counts are of one device.

    `executor` is vLLM's MultiprocExecutor. Its calls reach the ranks in order, so only the engine core's thread may
    make them. Raises RuntimeError if the ranks lay their caches out differently.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        caches = self._all(_cache)
        self.gpus = len(caches)
        self.layout = caches[0].layout
        if any(cache.layout != self.layout for cache in caches):
            raise RuntimeError("the ranks lay their KV caches out differently, so they cannot be resized together")
        self.blocks_asleep = max(cache.blocks_asleep for cache in caches)
        self.floor_blocks = self.backed_blocks = max(cache.floor_blocks for cache in caches)
        self._moved(_back, self.floor_blocks)  # a rank whose warm-up wrote fewer blocks than another's follows it

    def _all(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """Call a function with the worker of each rank, and return the results in the order of the ranks.

        If a rank failed, raises OutOfMemory or RuntimeError, once all have answered.
        """
        answers: list[T | _Failed] = self._executor.collective_rpc(_answer, args=(function, *arguments))
        results = []
        for answer in answers:
            if isinstance(answer, _Failed):
                raise OutOfMemory(answer.reason) if answer.out_of_memory else RuntimeError(answer.reason)
            results.append(answer)
        return results

    def _moved(self, function: Callable[..., int], *arguments: Any) -> int:
        """Call a function that moves memory, and return the bytes on one device."""
        return max(self._all(function, *arguments))

    def figures(self) -> Figures:
        """Return the figures of the rank that leaves the least of its device; `copy_bytes` are those of all."""
        each: list[Figures] = self._all(methodcaller("figures"))
        return Figures(
            min(figures.device_bytes for figures in each),
            tuple(uuid for figures in each for uuid in figures.device_uuids),
            max(figures.fixed_bytes for figures in each),
            max(figures.asleep_bytes for figures in each),
            sum(figures.copy_bytes for figures in each),
        )

    def back(self, blocks: int) -> int:
        """Back the same blocks in every rank: see ElasticWorker.back. If one rank cannot, none does."""
        if blocks == self.backed_blocks:  # to ask the ranks would wait for the steps in flight
            return 0
        try:
            moved_bytes = self._moved(_back, blocks)
        except Exception:
            self._moved(_back, self.backed_blocks)
            raise
        self.backed_blocks = blocks
        return moved_bytes

    def fence(self, blocks: int) -> None:
        """Do nothing: each rank sets its fence itself, before it releases memory."""

    def release_weights(self) -> int:
        return self._moved(methodcaller("release_weights"))

    def restore_weights(self) -> int:
        return self._moved(methodcaller("restore_weights"))


class InPlace(Executor):
    """An executor that runs each call at once, in the calling thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (the future raises it)
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class _Failed:
    reason: str
    out_of_memory: bool


@dataclass(frozen=True)
class _Cache:
    layout: BlockLayout
    floor_blocks: int
    blocks_asleep: int


# The following run in a rank's process.


def _answer(rank: Any, function: Callable[..., T], *arguments: Any) -> T | _Failed:
    """Call a function with the rank's worker, which vLLM has wrapped. Return the result, or why it failed.

    A rank must neither raise nor return an exception: vLLM would then not read the answers of the later ranks, and
    return them for the next call.
    """
    try:
        return function(rank.worker, *arguments)
    except Exception as error:  # noqa: BLE001 (the engine core raises it)
        return _Failed(f"device {rank.worker.local_rank} of the group: {error}", isinstance(error, OutOfMemory))


def _cache(worker: ElasticWorker) -> _Cache:
    return _Cache(worker.layout, worker.floor_blocks, worker.blocks_asleep)


def _back(worker: ElasticWorker, blocks: int) -> int:
    worker.fence(blocks)
    return worker.back(blocks)
