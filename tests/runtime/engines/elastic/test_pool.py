"""Tests of the elastic block pool under random operations: no block is lost, or handed out above the capacity."""

import tracemalloc
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.engines.elastic.pool import ElasticBlockPool

CEILING = 12


class Pool(RuleBasedStateMachine):
    """Requests take, free and share blocks, while the capacity changes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ElasticBlockPool(CEILING, enable_caching=True, hash_block_size=16)
        self.used: list[list[Any]] = []
        self.hashes = 0

    @rule(capacity=st.integers(2, CEILING))
    def change_capacity(self, capacity: int) -> None:
        self.pool.set_capacity(capacity)

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count <= self.pool.get_num_free_blocks():
            self.used.append(self.pool.get_new_blocks(count))

    @rule()
    def take_one(self) -> None:
        """The pool hands out the uncached block with the lowest id, and a cached one only if there is no other."""
        free = self.pool.free_block_queue.get_all_free_blocks()
        uncached = [block.block_id for block in free if block.block_hash is None]
        if free:
            [block] = self.pool.get_new_blocks(1)
            assert block.block_id == min(uncached, default=block.block_id)
            self.used.append([block])

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        """A block becomes full, and enters the prefix cache unless it drains."""
        block = data.draw(st.sampled_from([b for blocks in self.used for b in blocks]))
        if block.block_hash is None:
            self.hashes += 1
            self.pool._insert_block_hash(b"%d\0\0\0\0" % self.hashes, block, 16)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """A request whose prefix is cached shares the block."""
        cached = [b for b in self.pool.blocks if b.block_hash is not None]
        if cached:
            block = data.draw(st.sampled_from(cached))
            assert block.block_id < self.pool.num_gpu_blocks
            self.pool.touch([block])
            self.used.append([block])

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.pool.free_blocks(reversed(blocks))

    @rule()
    def reset(self) -> None:
        assert self.pool.reset_prefix_cache() == (not self.used)

    @invariant()
    def every_block_is_free_used_or_parked(self) -> None:
        pool, capacity = self.pool, self.pool.num_gpu_blocks
        free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
        used = {block.block_id for blocks in self.used for block in blocks}
        assert free == {block.block_id for block in pool.blocks[1:capacity]} - used
        assert pool.draining == {block for block in used if block >= capacity}
        assert pool.get_num_free_blocks() == len(free)
        assert abs(pool.get_usage() - len(used) / (capacity - 1)) < 1e-9
        counts = {b.block_id: sum(b in blocks for blocks in self.used) for b in pool.blocks[1:]}
        assert counts == {b.block_id: b.ref_cnt for b in pool.blocks[1:]}

    @invariant()
    def no_block_above_the_capacity_is_cached(self) -> None:
        assert all(block.block_hash is None for block in self.pool.blocks[self.pool.num_gpu_blocks :])


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30)


def test_repeated_resizes_do_not_grow_the_queue() -> None:
    pool = ElasticBlockPool(2001, enable_caching=True, hash_block_size=16)

    def cycle(times: int) -> None:
        for _ in range(times):
            pool.set_capacity(2)
            pool.set_capacity(2001)

    tracemalloc.start()
    try:
        cycle(2)
        before, _ = tracemalloc.get_traced_memory()
        cycle(20)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2000 * 8, "the queue keeps more than one entry per block"
