"""The workers of an engine whose model is spread over several devices (tensor parallelism), as one worker.

All ranks back and release the same blocks, between the same two steps: the engine core sends them the change in the
queue that also carries the steps, and waits until each has made it.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from runtime.engines.elastic.layout import BlockLayout
from runtime.engines.elastic.pages import OutOfMemory
from runtime.engines.elastic.worker import ElasticWorker, Figures

P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """What a resize needs of the workers. The methods are those of ElasticWorker, and bytes are those of one device.

    `executor` is vLLM's MultiprocExecutor. Its calls reach the ranks in order, so only the engine core's thread may
    make them. Raises RuntimeError if the ranks lay their caches out differently.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        caches = self._all(_cache)
        self.layout = caches[0].layout
        if any(cache.layout != self.layout for cache in caches):
            raise RuntimeError("the ranks lay their KV caches out differently, so they cannot be resized together")
        self.blocks_asleep = max(cache.blocks_asleep for cache in caches)
        self.floor_blocks = self.backed_blocks = max(cache.floor_blocks for cache in caches)
        self.back(self.floor_blocks)  # a rank whose warm-up wrote fewer blocks than another's follows it

    def _all(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """Call a function with the worker of each rank, and return the results in the order of the ranks."""
        results: list[T] = self._executor.collective_rpc(function, args=arguments)
        return results

    def _moved(self, function: Callable[..., int | Exception], *arguments: Any) -> int:
        """Call a function that moves memory, and return the bytes. Raise the error of the first rank that failed."""
        results = self._all(function, *arguments)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return max(result for result in results if isinstance(result, int))

    def figures(self) -> Figures:
        """Return the figures of the rank that leaves the least of its device; `copy_bytes` are those of all."""
        each = self._all(_figures)
        return Figures(
            min(figures.device_bytes for figures in each),
            tuple(uuid for figures in each for uuid in figures.device_uuids),
            max(figures.fixed_bytes for figures in each),
            max(figures.asleep_bytes for figures in each),
            sum(figures.copy_bytes for figures in each),
        )

    def back(self, blocks: int) -> int:
        """Back the same blocks in every rank: see ElasticWorker.back. If one rank cannot, none does."""
        try:
            moved_bytes = self._moved(_back, blocks)
        except Exception:
            self._moved(_back, self.backed_blocks)
            raise
        self.backed_blocks = blocks
        return moved_bytes

    def fence(self) -> None:
        """Do nothing: each rank sets its fence itself, before it releases memory."""

    def release_weights(self) -> int:
        return self._moved(_release_weights)

    def restore_weights(self) -> int:
        return self._moved(_restore_weights)


class InPlace(Executor):
    """Runs what it is given at once, in the calling thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (the future raises it)
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class _Cache:
    layout: BlockLayout
    floor_blocks: int
    blocks_asleep: int


# The following run in a rank's process. vLLM passes its wrapper of the worker.


def _cache(rank: Any) -> _Cache:
    worker: ElasticWorker = rank.worker
    return _Cache(worker.layout, worker.floor_blocks, worker.blocks_asleep)


def _figures(rank: Any) -> Figures:
    worker: ElasticWorker = rank.worker
    return worker.figures()


def _back(rank: Any, blocks: int) -> int | Exception:
    rank.worker.fence()
    return _or_error(rank, rank.worker.back, blocks)


def _release_weights(rank: Any) -> int | Exception:
    return _or_error(rank, rank.worker.release_weights)


def _restore_weights(rank: Any) -> int | Exception:
    return _or_error(rank, rank.worker.restore_weights)


def _or_error(rank: Any, move: Callable[..., int], *arguments: Any) -> int | Exception:
    """Return the bytes moved, or the error. vLLM would send only the text of an error that is raised."""
    try:
        return move(*arguments)
    except Exception as error:  # noqa: BLE001 (the engine core raises it)
        kind = OutOfMemory if isinstance(error, OutOfMemory) else RuntimeError
        return kind(f"device {rank.worker.local_rank} of the group: {error}")
