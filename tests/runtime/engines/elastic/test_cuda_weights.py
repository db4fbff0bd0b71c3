"""Tests of weights that leave the GPU: the real cuda-bindings over the stub driver, and a stub of vLLM's CuMem pool."""

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from vllm.device_allocator import AllocationData, cumem

from runtime.engines.elastic.pages import OutOfMemory, Pages

if TYPE_CHECKING:
    from runtime.engines.elastic.cuda_weights import CudaWeights

MIB = 1 << 20
NO_LIMIT = ctypes.c_size_t(-1)


class Pool:
    """vLLM's CuMem pool, whose C extension only its CUDA build has: allocations in the reserved address space of pages.

    `create_and_map` raises RuntimeError with the driver's text, as the extension does.
    """

    def __init__(self, pages: Any) -> None:
        self.pages = pages
        self.allocations: dict[int, AllocationData] = {}
        self._used: int = 0

    def allocate(self, size: int, tag: str = "weights") -> int:
        address = int(self.pages.address) + self._used
        self._used += size
        self.allocations[address] = AllocationData((0, size, address, 0), tag)
        self.map(0, size, address, 0)
        return address

    def map(self, device: int, size: int, address: int, handle: int) -> None:
        start = address - self.pages.address
        try:
            self.pages.back(start, start + size)
        except OutOfMemory as error:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:171") from error

    def unmap(self, device: int, size: int, address: int, handle: int) -> None:
        start = address - self.pages.address
        for at in range(start, start + size, self.pages.granule_bytes):
            self.pages._release_one(at)  # does not wait for the device, as the extension does not


@pytest.fixture
def pool(cuda: Callable[..., Pages], driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    made = Pool(cuda(64 * MIB))
    monkeypatch.setattr(cumem, "python_create_and_map", made.map)
    monkeypatch.setattr(cumem, "python_unmap_and_release", made.unmap)
    yield made
    driver.stub_set_pinned_limit(NO_LIMIT)


def weights_of(pool: Pool, parameters: dict[int, int]) -> "CudaWeights":
    from runtime.engines.elastic.cuda_weights import CudaWeights  # imports the driver, so the stub must be loaded first

    return CudaWeights(pool.allocations, [*parameters.items()], 0)


def fill(address: int, size: int, value: int) -> None:
    ctypes.memset(address, value, size)


def content(address: int, size: int) -> set[int]:
    return set(ctypes.string_at(address, size))


def test_weights_leave_the_device_and_return_to_the_same_addresses(pool: Pool, driver: ctypes.CDLL) -> None:
    sizes = {pool.allocate(size): size for size in (8 * MIB, 4 * MIB)}
    for number, (address, size) in enumerate(sizes.items(), 1):
        fill(address, size, number)
    weights, pinned_before = weights_of(pool, sizes), driver.stub_pinned()
    assert weights.nbytes == 12 * MIB
    assert weights.release() == 12 * MIB
    assert (driver.stub_in_use(), driver.stub_pinned() - pinned_before) == (0, 12 * MIB)
    assert weights.restore() == 12 * MIB
    assert [content(address, size) for address, size in sizes.items()] == [{1}, {2}]


def test_parameters_are_copied_once_and_what_may_change_is_copied_again(pool: Pool, driver: ctypes.CDLL) -> None:
    parameter, buffer = pool.allocate(8 * MIB), pool.allocate(4 * MIB)
    weights = weights_of(pool, {parameter: 8 * MIB - 500})
    for value in (1, 2, 3):
        fill(buffer, 4 * MIB, value)
        fill(parameter, 8 * MIB, 7)
        before = driver.stub_copied()
        weights.release()
        assert driver.stub_copied() - before == (12 if value == 1 else 4) * MIB
        weights.restore()
        assert (content(parameter, 8 * MIB), content(buffer, 4 * MIB)) == ({7}, {value})


@pytest.mark.parametrize(
    ("segment", "parameters"),
    [(2 * MIB, [2 * MIB]), (20 * MIB, [10 * MIB, 8 * MIB])],
    ids=["a segment of small tensors", "a segment with room for another tensor"],
)
def test_memory_that_may_hold_other_tensors_is_copied_again(
    segment: int, parameters: list[int], pool: Pool, driver: ctypes.CDLL
) -> None:
    at = start = pool.allocate(segment)
    spans = {}
    for size in parameters:
        spans[at], at = size, at + size
    weights = weights_of(pool, spans)
    for value in (1, 2):
        fill(start, segment, value)
        weights.release()
        weights.restore()
        assert content(start, segment) == {value}


def test_other_memory_of_the_pool_stays(pool: Pool, driver: ctypes.CDLL) -> None:
    pool.allocate(4 * MIB)
    pool.allocate(2 * MIB, "workspace")
    weights = weights_of(pool, {})
    assert (weights.nbytes, weights.release(), driver.stub_in_use()) == (4 * MIB, 4 * MIB, 2 * MIB)
    weights.restore()


def test_release_waits_for_queued_steps(pool: Pool, driver: ctypes.CDLL) -> None:
    address = pool.allocate(4 * MIB)
    driver.stub_hold(1)
    driver.stub_launch(address, 4 * MIB, 0)
    weights = weights_of(pool, {address: 4 * MIB})
    weights.release()
    assert driver.stub_queued() == 0
    weights.restore()
    assert driver.stub_queued() == 0


def test_a_host_without_memory_for_the_copy_keeps_the_weights_on_the_device(pool: Pool, driver: ctypes.CDLL) -> None:
    addresses = [pool.allocate(4 * MIB), pool.allocate(4 * MIB)]
    driver.stub_set_pinned_limit(driver.stub_pinned() + 6 * MIB)
    with pytest.raises(OutOfMemory, match="the host cannot hold a copy of the weights, 8388608 bytes"):
        weights_of(pool, dict.fromkeys(addresses, 4 * MIB)).release()
    assert driver.stub_in_use() == 8 * MIB
    assert not any(data.is_asleep for data in pool.allocations.values())


def test_a_full_device_is_reported_and_a_later_wake_continues(pool: Pool, driver: ctypes.CDLL) -> None:
    sizes: dict[int, Any] = {pool.allocate(4 * MIB): 4 * MIB for _ in range(3)}
    for address in sizes:
        fill(address, 4 * MIB, 5)
    weights = weights_of(pool, sizes)
    weights.release()
    driver.stub_set_limit(8 * MIB)
    with pytest.raises(OutOfMemory, match="the GPU cannot hold the weights: CUDA Error: out of memory"):
        weights.restore()
    driver.stub_set_limit(NO_LIMIT)
    assert weights.restore() == 4 * MIB
    assert all(content(address, 4 * MIB) == {5} for address in sizes)
