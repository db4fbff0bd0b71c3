"""A block pool whose capacity changes while requests run."""

import heapq
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class CompactQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """A free-block queue that hands out uncached blocks first, lowest block id first.

    Blocks in use gather at low ids that way, so a shrink finds few of them above the new capacity. Blocks that prefix
    caching may still find come after the uncached ones, least recently used first, as in vLLM's own queue.

    vLLM's pool puts uncached blocks in front with `prepend_n` and cached ones at the end with `append_n`. This class
    keeps the former in a heap and leaves the latter in the linked list of the base class.
    """

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        super().__init__([])
        # A heap of block ids, each at most once. An id stays in the heap when its block is removed; the block's entry
        # in the dict is then None.
        self._uncached_ids: list[int] = []
        self._uncached: dict[int, KVCacheBlock | None] = {}
        self.prepend_n(blocks)

    def popleft(self) -> KVCacheBlock:
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Remove `n` blocks from the queue and return them. At least `n` must be free."""
        assert n <= self.num_free_blocks, (n, self.num_free_blocks)
        uncached: list[KVCacheBlock] = []
        while len(uncached) < n and self._uncached_ids:
            block = self._uncached.pop(heapq.heappop(self._uncached_ids))
            if block is not None:
                uncached.append(block)
        self.num_free_blocks -= len(uncached)
        return [*uncached, *super().popleft_n(n - len(uncached))]

    def remove(self, block: KVCacheBlock) -> None:
        if self._uncached.get(block.block_id) is None:
            super().remove(block)
        else:
            self._uncached[block.block_id] = None
            self.num_free_blocks -= 1

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Add uncached blocks, in any order."""
        for block in blocks:
            if block.block_id not in self._uncached:
                heapq.heappush(self._uncached_ids, block.block_id)
            self._uncached[block.block_id] = block
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        uncached = [block for _, block in sorted(self._uncached.items()) if block is not None]
        return [*uncached, *super().get_all_free_blocks()]


class ElasticBlockPool(BlockPool):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """A pool over all blocks of the ceiling, of which it hands out only the first `num_gpu_blocks`, the live capacity.

    A block above the capacity is either parked, that is in no queue, or draining: a request still uses it, and the
    pool parks it when its last user frees it. Prefix caching finds neither. `get_usage` refers to the live capacity.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        free: list[KVCacheBlock] = self.free_block_queue.get_all_free_blocks()  # type: ignore[has-type]  # vLLM's
        self.free_block_queue = CompactQueue(free)
        self.num_gpu_blocks: int = len(self.blocks)
        self.draining: set[int] = set()
        """Ids of the blocks above the capacity that requests still use."""

    def set_capacity(self, capacity: int) -> None:
        """Set the number of blocks that may be handed out, the null block included: 2 up to the ceiling."""
        assert 1 < capacity <= len(self.blocks), capacity
        before, self.num_gpu_blocks = self.num_gpu_blocks, capacity
        for block in self.blocks[capacity:before]:
            if block.ref_cnt:
                self.draining.add(block.block_id)
            else:
                self.free_block_queue.remove(block)
            self._maybe_evict_cached_block(block)
        self.free_block_queue.prepend_n(
            [block for block in self.blocks[before:capacity] if block.block_id not in self.draining]
        )
        self.draining -= set(range(before, capacity))

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Release a request's hold on its blocks, and park draining ones that have no user left."""
        if not self.draining:
            super().free_blocks(ordered_blocks)
            return
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        for block in blocks:
            if block.block_id in self.draining and not block.ref_cnt:
                self.draining.discard(block.block_id)
                self.free_block_queue.remove(block)

    def _insert_block_hash(self, block_hash: Any, block: KVCacheBlock, num_tokens: int | None) -> None:
        """Keep a draining block that fills up out of the prefix cache: a hit would give it a new user."""
        if block.block_id < self.num_gpu_blocks:
            super()._insert_block_hash(block_hash, block, num_tokens)

    @property
    def in_use(self) -> int:
        """The number of blocks that requests use, draining ones included."""
        return int(self.num_gpu_blocks - 1 - self.get_num_free_blocks() + len(self.draining))

    def get_usage(self) -> float:
        """Return the blocks in use, draining ones included, as a fraction of the capacity without the null block.

        The result exceeds 1 while more blocks drain than are free.
        """
        return self.in_use / (self.num_gpu_blocks - 1)

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache and return True; change nothing and return False while requests use blocks."""
        done = not self.draining and bool(super().reset_prefix_cache())
        if done:  # all free blocks are uncached now, so all belong in the heap
            self.free_block_queue = CompactQueue(self.free_block_queue.get_all_free_blocks())
        return done
