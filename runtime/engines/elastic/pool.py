"""A block pool whose capacity moves while requests run."""

import heapq
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class CompactQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's queue of free blocks, but those that hold nothing worth finding come first, and the lowest of them.

    What is in use then gathers at the bottom, so that a line that moves down finds little above it. Blocks that prefix
    caching may find again follow, least recently used first, as ever.
    """

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        super().__init__([])
        # A heap of block ids, each at most once, and their blocks; None for an id whose block was removed since.
        self._lowest: list[int] = []
        self._plain: dict[int, KVCacheBlock | None] = {}
        self.prepend_n(blocks)

    def popleft(self) -> KVCacheBlock:
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        assert n <= self.num_free_blocks, (n, self.num_free_blocks)
        taken: list[KVCacheBlock] = []
        while len(taken) < n and self._lowest:
            block = self._plain.pop(heapq.heappop(self._lowest))
            if block is not None:
                taken.append(block)
        self.num_free_blocks -= len(taken)
        return [*taken, *super().popleft_n(n - len(taken))]

    def remove(self, block: KVCacheBlock) -> None:
        if self._plain.get(block.block_id) is None:
            super().remove(block)
        else:
            self._plain[block.block_id] = None
            self.num_free_blocks -= 1

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Blocks that hold nothing worth finding; their order is no matter."""
        for block in blocks:
            if block.block_id not in self._plain:
                heapq.heappush(self._lowest, block.block_id)
            self._plain[block.block_id] = block
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        plain = [block for _, block in sorted(self._plain.items()) if block is not None]
        return [*plain, *super().get_all_free_blocks()]


class ElasticBlockPool(BlockPool):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's pool over all blocks of the ceiling, of which the first `num_gpu_blocks` may be handed out.

    A block above the line is parked, in no queue, or draining: still in use, and parked when its last user lets go.
    Neither is found by prefix caching. `num_gpu_blocks` is the live capacity, so that usage follows it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        free: list[KVCacheBlock] = self.free_block_queue.get_all_free_blocks()  # type: ignore[has-type]  # vLLM's
        self.free_block_queue = CompactQueue(free)
        self.num_gpu_blocks: int = len(self.blocks)
        self.draining: set[int] = set()

    def set_capacity(self, capacity: int) -> None:
        """Move the line: blocks, of which one is the null block."""
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

    def get_usage(self) -> float:
        """What is in use, draining blocks too, to what may be handed out: above 1 while more drains than is free."""
        there_are = self.num_gpu_blocks - 1
        return float((there_are - self.get_num_free_blocks() + len(self.draining)) / there_are)

    def reset_prefix_cache(self) -> bool:
        done = not self.draining and bool(super().reset_prefix_cache())
        if done:  # nothing is worth finding any more
            self.free_block_queue = CompactQueue(self.free_block_queue.get_all_free_blocks())
        return done
