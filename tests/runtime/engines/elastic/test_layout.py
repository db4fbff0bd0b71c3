"""Tests of the block layout against a count of the granules that each byte lies in."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.elastic.layout import BlockLayout, Run, layout_of


@dataclass
class Tensor:
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    granule, stride, blocks = draw(st.integers(1, 16)), draw(st.integers(1, 40)), draw(st.integers(2, 30))
    layers = draw(st.integers(1, 4))
    return layout_of([Tensor(["x"] * layers, stride * blocks, stride)], blocks, granule)


def granules(layout: BlockLayout, capacity: int) -> set[int]:
    """Return the granules that the first `capacity` blocks of every run touch, byte by byte."""
    return {
        byte // layout.granule_bytes
        for run in layout.runs
        for byte in range(run.start, run.start + capacity * run.stride)
    }  # fmt: skip


@given(layouts(), st.data())
def test_spans_are_the_granules_that_the_higher_capacity_adds(layout: BlockLayout, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, layout.blocks))
    high = data.draw(st.integers(low, layout.blocks))
    spans = list(layout.spans(low, high))
    touched = [at // layout.granule_bytes for start, stop in spans for at in range(start, stop, layout.granule_bytes)]
    assert len(touched) == len(set(touched))
    assert set(touched) == (granules(layout, high) - granules(layout, low) if high else set())
    assert all(0 <= start < stop <= layout.size_bytes for start, stop in spans)


@given(layouts(), st.integers(0, 6000))
def test_capacity_is_the_largest_that_fits(layout: BlockLayout, nbytes: int) -> None:
    capacity = layout.capacity(nbytes)
    assert layout.backed_bytes(capacity) <= nbytes or capacity == 0
    assert capacity == layout.blocks or layout.backed_bytes(capacity + 1) > nbytes


def test_block_outermost_tensors_share_one_run() -> None:
    tensors = [Tensor(["a", "b"], 64, 256), Tensor(["c", "d"], 64, 256, offset=128)]
    assert layout_of(tensors, blocks=10, granule_bytes=1).runs == (Run(0, 256),)


def test_overlapping_cache_groups_count_once() -> None:
    tensors = [Tensor(["a", "b"], 640, 64), Tensor(["c", "d"], 640, 64)]
    assert layout_of(tensors, blocks=10, granule_bytes=1).backed_bytes(10) == 1280


def test_other_overlaps_are_rejected() -> None:
    with pytest.raises(ValueError, match="overlap"):
        layout_of([Tensor(["a"], 640, 64), Tensor(["b"], 640, 64, offset=100)], blocks=10, granule_bytes=1)
