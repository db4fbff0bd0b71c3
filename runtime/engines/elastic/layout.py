"""Where the KV cache's blocks lie in its address space: pure arithmetic, no memory.

vLLM 0.32 puts the whole cache into one allocation (`allocate_kv_cache` in vllm/v1/worker/utils.py). With the layers
outermost (CPU) every layer is a run of blocks of its own; with the blocks outermost there is one run, and a range of
blocks is one range of bytes.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class CacheTensor(Protocol):
    """The fields of vLLM's KVCacheTensor that say where layers and blocks lie, all in bytes."""

    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int


@dataclass(frozen=True)
class Run:
    """Blocks in a row: block b takes [start + b * stride, start + (b + 1) * stride)."""

    start: int
    stride: int


@dataclass(frozen=True)
class BlockLayout:
    """The runs of a cache of `blocks` blocks, and the granule in which its memory comes and goes (bytes).

    Block 0, vLLM's null block, is always backed; so a granule that two runs share is never given back.
    """

    runs: tuple[Run, ...]
    blocks: int
    granule: int

    @property
    def size(self) -> int:
        """The address space to reserve: bytes, whole granules."""
        return self._up(max(run.start + self.blocks * run.stride for run in self.runs))

    def spans(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """What a capacity of `high` blocks needs beyond one of `low`, as [start, stop) bytes in whole granules.

        Growing backs it, shrinking gives it back. `low` 0 is the state in which nothing is backed.
        """
        for index, run in enumerate(self.runs if high else ()):
            start = self._up(run.start + low * run.stride) if low else self._down(run.start)
            stop = self._up(run.start + high * run.stride)
            if index + 1 < len(self.runs):
                stop = min(stop, self._down(self.runs[index + 1].start))
            if start < stop:
                yield start, stop

    def backed_bytes(self, capacity: int) -> int:
        """What a capacity takes: bytes."""
        return sum(stop - start for start, stop in self.spans(0, capacity))

    def capacity(self, nbytes: int) -> int:
        """The most blocks that `nbytes` back."""
        return bisect_right(range(self.blocks + 1), nbytes, key=self.backed_bytes) - 1

    def _up(self, nbytes: int) -> int:
        return -(-nbytes // self.granule) * self.granule

    def _down(self, nbytes: int) -> int:
        return nbytes // self.granule * self.granule


def layout_of(tensors: Iterable[CacheTensor], blocks: int, granule: int) -> BlockLayout:
    """The layout of vLLM's `kv_cache_config.kv_cache_tensors`.

    Tensors of different cache groups may lie over each other: a block belongs to one group at a time.
    """
    runs: set[Run] = set()
    for tensor in tensors:
        if tensor.layer_stride < tensor.block_stride:  # blocks outermost: all layers of a block lie together
            runs.add(Run(0, tensor.block_stride))
        else:
            starts = (tensor.offset + layer * tensor.layer_stride for layer in range(len(tensor.layers)))
            runs.update(Run(start, tensor.block_stride) for start in starts)
    ordered = tuple(sorted(runs, key=lambda run: run.start))
    if any(a.start + blocks * a.stride > b.start for a, b in pairwise(ordered)):
        raise ValueError(f"the KV cache's layers overlap in a way that is not known here: {ordered}")
    return BlockLayout(ordered, blocks, granule)
