"""Tests of both backends of pages: the host for real, and CUDA with the real cuda-bindings over a stub driver."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from runtime.engines.elastic.pages import HostPages, OutOfMemory, Pages

MIB = 1 << 20


def test_device_uuid_has_the_format_of_nvml(driver: ctypes.CDLL) -> None:
    from runtime.engines.elastic import cuda_driver  # imports the driver, so the stub must be loaded first

    assert cuda_driver.device_uuid(1) == "10111213-1415-1617-1819-1a1b1c1d1e1f"
    with pytest.raises(cuda_driver.CudaError, match="cuDeviceGetUuid: CUDA_ERROR_INVALID_DEVICE"):
        cuda_driver.device_uuid(16)


def byte(pages: Pages, at: int) -> ctypes.c_ubyte:
    return ctypes.c_ubyte.from_address(pages.address + at)


@pytest.mark.parametrize("backend", ["host", "cuda"])
def test_released_memory_is_zeroed_when_backed_again(backend: str, request: pytest.FixtureRequest) -> None:
    pages = HostPages(8 * MIB) if backend == "host" else request.getfixturevalue("cuda")(8 * MIB)
    pages.back(0, 4 * MIB)
    assert byte(pages, 0).value == 0
    byte(pages, 0).value = byte(pages, 4 * MIB - 1).value = 7
    pages.release(2 * MIB, 4 * MIB)
    pages.back(2 * MIB, 6 * MIB)
    assert (byte(pages, 0).value, byte(pages, 4 * MIB - 1).value, byte(pages, 6 * MIB - 1).value) == (7, 0, 0)


@pytest.mark.parametrize("backend", ["host", "cuda"])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (4 * MIB, 2 * MIB), (1, 2 * MIB), (0, 2 * MIB + 1), (0, 10 * MIB)])
def test_ranges_must_be_whole_granules_in_bounds(
    backend: str, start: int, stop: int, request: pytest.FixtureRequest
) -> None:
    pages = HostPages(8 * MIB) if backend == "host" else request.getfixturevalue("cuda")(8 * MIB)
    for change in (pages.back, pages.release):
        with pytest.raises(ValueError, match="whole granules"):
            change(start, stop)


def test_released_host_memory_is_no_longer_resident() -> None:
    pages = HostPages(64 * MIB)
    ctypes.memset(pages.address, 1, 64 * MIB)
    full = resident()
    pages.release(0, 64 * MIB)
    assert full - resident() > 60 * MIB
    pages.close()
    pages.close()


def resident() -> int:
    fields = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss:"]) << 10


def test_granule_is_a_multiple_of_the_device_minimum(cuda: Callable[..., Pages]) -> None:
    assert cuda(1, granule_bytes=1).granule_bytes == 2 * MIB
    assert cuda(1, granule_bytes=3 * MIB).granule_bytes == 4 * MIB
    wide = cuda(33 * MIB, granule_bytes=32 * MIB)
    assert (wide.granule_bytes, wide.size_bytes) == (32 * MIB, 64 * MIB)


def test_granule_need_not_be_a_power_of_two(cuda: Callable[..., Pages]) -> None:
    pages = cuda(7 * MIB, granule_bytes=6 * MIB)
    assert (pages.granule_bytes, pages.size_bytes, pages.address % (2 * MIB)) == (6 * MIB, 12 * MIB, 0)
    pages.back(0, 12 * MIB)
    pages.release(6 * MIB, 12 * MIB)
    byte(pages, 6 * MIB - 1).value = 7


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_out_of_memory_during_a_grow_changes_nothing(
    cuda: Callable[..., Pages], driver: ctypes.CDLL, spare: int
) -> None:
    pages = cuda(16 * MIB)
    pages.back(0, 4 * MIB)
    byte(pages, 0).value = 7
    driver.stub_set_limit((2 + spare) * 2 * MIB)
    with pytest.raises(OutOfMemory, match="cuMemCreate"):
        pages.back(4 * MIB, 12 * MIB)
    assert (driver.stub_in_use(), driver.stub_mappings(), byte(pages, 0).value) == (4 * MIB, 2, 7)
    driver.stub_set_limit(6 * 2 * MIB)
    pages.back(4 * MIB, 12 * MIB)
    assert driver.stub_in_use() == 12 * MIB


def test_backing_twice_and_releasing_unbacked_granules_are_rejected(cuda: Callable[..., Pages]) -> None:
    pages = cuda(8 * MIB)
    pages.back(2 * MIB, 4 * MIB)
    with pytest.raises(ValueError, match="granule at 2097152 is backed already"):
        pages.back(0, 4 * MIB)
    with pytest.raises(ValueError, match="granule at 0 is not backed"):
        pages.release(0, 4 * MIB)


def test_memory_in_use_matches_backed_granules_in_any_order(cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    granule, count = 2 * MIB, 6

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.pages = cuda(granule * count)
            self.backed: set[int] = set()
            self.limit_granules = 100

        @rule(free_granules=st.integers(0, 8))
        def limit(self, free_granules: int) -> None:
            self.limit_granules = len(self.backed) + free_granules
            driver.stub_set_limit(self.limit_granules * granule)

        @rule(span=st.sampled_from(list(itertools.combinations(range(count + 1), 2))))
        def back(self, span: tuple[int, int]) -> None:
            requested = set(range(*span))
            expected_error: type[Exception] | None = None
            if requested & self.backed:
                expected_error = ValueError
            elif len(requested | self.backed) > self.limit_granules:
                expected_error = OutOfMemory
            if expected_error:
                with pytest.raises(expected_error):
                    self.pages.back(span[0] * granule, span[1] * granule)
            else:
                self.pages.back(span[0] * granule, span[1] * granule)
                self.backed |= requested

        @precondition(lambda self: self.backed)
        @rule(data=st.data())
        def release(self, data: st.DataObject) -> None:
            at = data.draw(st.sampled_from(sorted(self.backed)))
            self.pages.release(at * granule, (at + 1) * granule)
            self.backed.remove(at)

        @invariant()
        def memory_in_use_matches_backed_granules(self) -> None:
            assert driver.stub_in_use() == len(self.backed) * granule
            assert driver.stub_mappings() == len(self.backed)

        def teardown(self) -> None:
            driver.stub_set_limit(ctypes.c_size_t(-1))
            self.pages.close()
            assert driver.stub_in_use() == 0

    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=15))


def test_cuda_error_names_the_call_and_the_status(cuda: Callable[..., Pages]) -> None:
    from runtime.engines.elastic.cuda_driver import CudaError

    pages = cuda(4 * MIB)
    pages.back(0, 2 * MIB)
    pages.address += 4096  # no caller can cause this: it makes the driver refuse an address
    with pytest.raises(CudaError, match="cuMemMap: CUDA_ERROR_INVALID_VALUE"):
        pages.back(2 * MIB, 4 * MIB)
    pages.address -= 4096


def test_release_waits_for_work_before_the_fence_only(cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    pages = cuda(8 * MIB)
    pages.back(0, 8 * MIB)
    driver.stub_hold(1)
    driver.stub_launch(pages.address + 4 * MIB, 4 * MIB, 0)
    pages.fence()
    driver.stub_launch(pages.address, 2 * MIB, 0)
    with ThreadPoolExecutor(1) as releaser:  # a thread without a CUDA context
        releaser.submit(pages.release, 4 * MIB, 8 * MIB).result()
    assert driver.stub_queued() == 1


@pytest.mark.parametrize("end", ["release", "close"])
def test_memory_is_not_unmapped_while_it_is_zeroed(end: str, cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    pages = cuda(4 * MIB)
    driver.stub_hold(1)
    pages.back(0, 4 * MIB)
    assert driver.stub_queued() == 1
    if end == "close":
        pages.close()
    else:
        pages.release(0, 4 * MIB)
    assert driver.stub_queued() == 0
