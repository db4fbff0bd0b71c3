"""Computes which bytes of the KV cache's address space hold which blocks. Pure arithmetic: it touches no memory.

vLLM 0.32 allocates the whole cache at once (`allocate_kv_cache` in vllm/v1/worker/utils.py). If layers are outermost,
as on the CPU, each layer has a run of blocks of its own. If blocks are outermost, there is one run, and a range of
blocks is one range of bytes.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class CacheTensor(Protocol):
    """The fields of vLLM's KVCacheTensor that place layers and blocks. Strides and offset in bytes."""

    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int


@dataclass(frozen=True)
class Run:
    """Consecutive blocks: block b occupies the bytes [start + b * stride, start + (b + 1) * stride)."""

    start: int
    stride: int


@dataclass(frozen=True)
class BlockLayout:
    """The runs of a cache of `blocks` blocks, whose memory is backed and released in granules of `granule_bytes`.

    A capacity is a number of blocks: the first ones of every run. Block 0, vLLM's null block, is always backed, and
    with it the granule in which one run ends and the next begins.
    """

    runs: tuple[Run, ...]
    blocks: int
    granule_bytes: int

    @property
    def size_bytes(self) -> int:
        """The address space that the cache needs: bytes, in whole granules."""
        return self._round_up(max(run.start + self.blocks * run.stride for run in self.runs))

    def spans(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield the [start, stop) bytes, in whole granules, that a capacity of `high` needs beyond one of `low`.

        Growing from `low` to `high` backs these spans; shrinking from `high` to `low` releases them. A capacity of 0
        means that nothing is backed, not even block 0.
        """
        for index, run in enumerate(self.runs if high else ()):
            start = self._round_up(run.start + low * run.stride) if low else self._round_down(run.start)
            stop = self._round_up(run.start + high * run.stride)
            if index + 1 < len(self.runs):
                stop = min(stop, self._round_down(self.runs[index + 1].start))
            if start < stop:
                yield start, stop

    def backed_bytes(self, capacity: int) -> int:
        """Return the bytes that back a capacity."""
        return sum(stop - start for start, stop in self.spans(0, capacity))

    def capacity(self, nbytes: int) -> int:
        """Return the largest capacity that `nbytes` can back."""
        return bisect_right(range(self.blocks + 1), nbytes, key=self.backed_bytes) - 1

    def _round_up(self, nbytes: int) -> int:
        return -(-nbytes // self.granule_bytes) * self.granule_bytes

    def _round_down(self, nbytes: int) -> int:
        return nbytes // self.granule_bytes * self.granule_bytes


def layout_of(tensors: Iterable[CacheTensor], blocks: int, granule_bytes: int) -> BlockLayout:
    """Return the layout of vLLM's `kv_cache_config.kv_cache_tensors`.

    Tensors of different cache groups may share bytes, because a block belongs to one group at a time. Raises ValueError
    if the runs overlap in any other way.
    """
    runs: set[Run] = set()
    for tensor in tensors:
        if tensor.layer_stride < tensor.block_stride:  # blocks are outermost: a block's layers are adjacent
            runs.add(Run(0, tensor.block_stride))
        else:
            starts = (tensor.offset + layer * tensor.layer_stride for layer in range(len(tensor.layers)))
            runs.update(Run(start, tensor.block_stride) for start in starts)
    ordered = tuple(sorted(runs, key=lambda run: run.start))
    if any(a.start + blocks * a.stride > b.start for a, b in pairwise(ordered)):
        raise ValueError(f"the KV cache's layers overlap, so its blocks cannot be resized: {ordered}")
    return BlockLayout(ordered, blocks, granule_bytes)
