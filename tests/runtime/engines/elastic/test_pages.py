"""Both backends keep one contract: the host's for real, CUDA's with the real cuda-bindings over a stand-in driver."""

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


def test_a_device_says_its_uuid_as_nvml_writes_it(driver: ctypes.CDLL) -> None:
    from runtime.engines.elastic import cuda_pages  # once the stand-in is loaded

    assert cuda_pages.device_uuid(1) == "10111213-1415-1617-1819-1a1b1c1d1e1f"
    with pytest.raises(cuda_pages.CudaError, match="cuDeviceGetUuid: CUDA_ERROR_INVALID_DEVICE"):
        cuda_pages.device_uuid(16)


def byte(pages: Pages, at: int) -> ctypes.c_ubyte:
    return ctypes.c_ubyte.from_address(pages.address + at)


@pytest.mark.parametrize("backend", ["host", "cuda"])
def test_what_was_released_comes_back_zeroed(backend: str, request: pytest.FixtureRequest) -> None:
    pages = HostPages(8 * MIB) if backend == "host" else request.getfixturevalue("cuda")(8 * MIB)
    pages.back(0, 4 * MIB)
    assert byte(pages, 0).value == 0
    byte(pages, 0).value = byte(pages, 4 * MIB - 1).value = 7
    pages.release(2 * MIB, 4 * MIB)
    pages.back(2 * MIB, 6 * MIB)
    assert (byte(pages, 0).value, byte(pages, 4 * MIB - 1).value, byte(pages, 6 * MIB - 1).value) == (7, 0, 0)


@pytest.mark.parametrize("backend", ["host", "cuda"])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (4 * MIB, 2 * MIB), (1, 2 * MIB), (0, 2 * MIB + 1), (0, 10 * MIB)])
def test_ranges_are_whole_granules_within(backend: str, start: int, stop: int, request: pytest.FixtureRequest) -> None:
    pages = HostPages(8 * MIB) if backend == "host" else request.getfixturevalue("cuda")(8 * MIB)
    for change in (pages.back, pages.release):
        with pytest.raises(ValueError, match="whole granules"):
            change(start, stop)


def test_host_memory_really_goes() -> None:
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


def test_the_granule_is_what_the_device_asks_for_or_a_multiple(cuda: Callable[..., Pages]) -> None:
    assert cuda(1, granule=1).granule == 2 * MIB
    assert cuda(1, granule=3 * MIB).granule == 4 * MIB
    wide = cuda(33 * MIB, granule=32 * MIB)
    assert (wide.granule, wide.size, wide.address % (32 * MIB)) == (32 * MIB, 64 * MIB, 0)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_out_of_memory_in_the_middle_of_a_grow_changes_nothing(
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


def test_what_is_backed_is_not_backed_again_nor_what_is_gone_released(cuda: Callable[..., Pages]) -> None:
    pages = cuda(8 * MIB)
    pages.back(2 * MIB, 4 * MIB)
    with pytest.raises(ValueError, match="already"):
        pages.back(0, 4 * MIB)
    with pytest.raises(ValueError, match="no memory at 0"):
        pages.release(0, 4 * MIB)


def test_any_order_of_growing_and_shrinking_adds_up(cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    granule, count = 2 * MIB, 6

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.pages = cuda(granule * count)
            self.backed: set[int] = set()
            self.room = 100

        @rule(room=st.integers(0, 8))
        def limit(self, room: int) -> None:
            self.room = room + len(self.backed)
            driver.stub_set_limit(self.room * granule)

        @rule(span=st.sampled_from(list(itertools.combinations(range(count + 1), 2))))
        def back(self, span: tuple[int, int]) -> None:
            asked = set(range(*span))
            wrong: type[Exception] | None = None
            if asked & self.backed:
                wrong = ValueError
            elif len(asked | self.backed) > self.room:
                wrong = OutOfMemory
            if wrong:
                with pytest.raises(wrong):
                    self.pages.back(span[0] * granule, span[1] * granule)
            else:
                self.pages.back(span[0] * granule, span[1] * granule)
                self.backed |= asked

        @precondition(lambda self: self.backed)
        @rule(data=st.data())
        def release(self, data: st.DataObject) -> None:
            at = data.draw(st.sampled_from(sorted(self.backed)))
            self.pages.release(at * granule, (at + 1) * granule)
            self.backed.remove(at)

        @invariant()
        def holds_what_is_backed(self) -> None:
            assert driver.stub_in_use() == len(self.backed) * granule
            assert driver.stub_mappings() == len(self.backed)

        def teardown(self) -> None:
            driver.stub_set_limit(ctypes.c_size_t(-1))
            self.pages.close()
            assert driver.stub_in_use() == 0

    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=15, deadline=None))


def test_the_drivers_refusals_are_told_by_name(cuda: Callable[..., Pages]) -> None:
    from runtime.engines.elastic.cuda_pages import CudaError

    pages = cuda(4 * MIB)
    pages.back(0, 2 * MIB)
    pages.address += 4096  # what no caller can do: the driver is given an address that is not its own
    with pytest.raises(CudaError, match="cuMemMap: CUDA_ERROR_INVALID_VALUE"):
        pages.back(2 * MIB, 4 * MIB)
    pages.address -= 4096


def test_release_waits_for_the_work_before_the_fence_and_for_none_after_it(
    cuda: Callable[..., Pages], driver: ctypes.CDLL
) -> None:
    pages = cuda(8 * MIB)
    pages.back(0, 8 * MIB)
    driver.stub_hold(1)
    driver.stub_launch(pages.address + 4 * MIB, 4 * MIB, 0)
    pages.fence()
    driver.stub_launch(pages.address, 2 * MIB, 0)
    with ThreadPoolExecutor(1) as releaser:  # a thread that has no CUDA context of its own
        releaser.submit(pages.release, 4 * MIB, 8 * MIB).result()
    assert driver.stub_queued() == 1


@pytest.mark.parametrize("end", ["release", "close"])
def test_memory_that_is_still_being_zeroed_is_not_unmapped(
    end: str, cuda: Callable[..., Pages], driver: ctypes.CDLL
) -> None:
    pages = cuda(4 * MIB)
    driver.stub_hold(1)
    pages.back(0, 4 * MIB)
    assert driver.stub_queued() == 1
    if end == "close":
        pages.close()
    else:
        pages.release(0, 4 * MIB)
    assert driver.stub_queued() == 0
