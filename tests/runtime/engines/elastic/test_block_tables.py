"""Tests of released blocks in block tables, with vLLM's own KV cache manager and block tables, without an engine."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables

from runtime.engines.elastic.block_tables import forget_blocks
from runtime.engines.elastic.pool import ElasticBlockPool
from runtime.engines.elastic.scheduler import _elastic_pools

BLOCK_TOKENS, WINDOW, LENGTH = 16, 64, 256
CEILING, ROW = 100, 16


class V1Rows:
    """The part of the V1 model runner that holds block tables, with vLLM's tables. The request may have no row."""

    def __init__(self, batched: bool) -> None:
        self.table = MultiGroupBlockTable(2, LENGTH, False, torch.device("cpu"), [BLOCK_TOKENS] * 2, [ROW] * 2)
        index = {"request": 0} if batched else {}
        self.input_batch = SimpleNamespace(num_reqs=len(index), req_id_to_index=index, block_table=self.table)
        self.requests = {"request": SimpleNamespace(block_ids=([], []))}

    def append(self, ids: tuple[list[int], ...]) -> None:
        for kept, new in zip(self.requests["request"].block_ids, ids, strict=True):
            kept.extend(new)
        if self.input_batch.num_reqs:
            self.table.append_row(ids, 0)

    def rows(self) -> list[list[int]]:
        kept = [list(ids) for ids in self.requests["request"].block_ids]
        if self.input_batch.num_reqs:
            tables = self.table.block_tables
            rows = [table.get_numpy_array()[0, : len(ids)].tolist() for table, ids in zip(tables, kept, strict=True)]
            assert rows == kept
        return kept


class V2Rows:
    """The part of the V2 model runner that holds block tables, with vLLM's tables. Its kernels need a GPU."""

    def __init__(self) -> None:
        tables = self.block_tables = block_tables_on_the_host([BLOCK_TOKENS] * 2, LENGTH, [ROW] * 2)
        self._length = [0, 0]
        self._each = [
            (staged.gpu[0], used[0])
            for staged, used in zip(tables.block_tables, tables.input_block_tables, strict=True)
        ]

    def append(self, ids: tuple[list[int], ...]) -> None:
        for group, new in enumerate(ids):
            start = self._length[group]
            self._length[group] += len(new)
            for table in self._each[group]:
                table[start : start + len(new)] = torch.tensor(new, dtype=torch.int32)

    def rows(self) -> list[list[int]]:
        assert all(torch.equal(table, used) for table, used in self._each)
        return [table[:length].tolist() for (table, _), length in zip(self._each, self._length, strict=True)]


def block_tables_on_the_host(block_tokens: list[int], step_tokens: int, row_blocks: list[int]) -> BlockTables:
    """Return the V2 model runner's block tables for two requests; one block size and row length per cache group."""
    with patch.object(buffer_utils, "is_uva_available", lambda: False):  # pinned memory needs a driver
        return BlockTables(block_tokens, 2, step_tokens, row_blocks, torch.device("cpu"))


def manager() -> KVCacheManager:
    """Return vLLM's manager of a model with full and with sliding-window attention, over an elastic pool."""
    shape: dict[str, Any] = {"block_size": BLOCK_TOKENS, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    specs = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=WINDOW)
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    config = KVCacheConfig(num_blocks=CEILING, kv_cache_tensors=[], kv_cache_groups=groups)
    with _elastic_pools():
        return KVCacheManager(config, LENGTH, BLOCK_TOKENS, BLOCK_TOKENS, enable_caching=False)


@pytest.mark.parametrize(
    "make", [lambda: V1Rows(batched=True), lambda: V1Rows(batched=False), V2Rows], ids=["v1", "v1-left-out", "v2"]
)
def test_rows_keep_no_released_block_that_a_sliding_window_has_passed(make: Callable[[], V1Rows | V2Rows]) -> None:
    runner = make()
    blocks = manager()
    pool = blocks.block_pool
    assert isinstance(pool, ElasticBlockPool)
    others = pool.get_new_blocks(50)  # of other requests, so that ours begins at high ids
    request = Request("request", [1] * LENGTH, SamplingParams(), None)
    while request.num_computed_tokens < 192:
        new = blocks.allocate_slots(request, BLOCK_TOKENS)
        assert new is not None
        runner.append(new.get_block_ids())
        request.num_computed_tokens += BLOCK_TOKENS
        if request.num_computed_tokens == 80:
            pool.free_blocks(others)  # the window's later blocks get low ids
    in_use = blocks.get_block_ids("request")
    held = {block for ids in in_use for block in ids}
    stale = {block for ids in runner.rows() for block in ids} - held
    first = max(max(ids) for ids in in_use) + 1
    assert any(block >= first for block in stale), "the window has passed no block that a shrink would release"
    pool.set_capacity(first)
    assert not pool.draining  # so the blocks from `first` up are released at once
    forget_blocks(runner, first, is_v2=isinstance(runner, V2Rows))
    for row, ids in zip(runner.rows(), in_use, strict=True):
        assert all(block < first for block in row)
        assert all(block == kept for block, kept in zip(row, ids, strict=True) if kept)  # 0 is the null block
