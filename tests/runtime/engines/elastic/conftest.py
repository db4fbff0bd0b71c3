"""Fixtures for CUDA pages over the stub of the CUDA driver."""

import ctypes
from collections.abc import Callable, Iterator

import pytest

from runtime.engines.elastic.pages import Pages
from tests import stubs

MIB = 1 << 20


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stub of the CUDA driver, with its counters (stub_*)."""
    library = stubs.cuda(tmp_path_factory.mktemp("cuda"))
    for count in ("stub_in_use", "stub_calls", "stub_pinned", "stub_copied"):
        getattr(library, count).restype = ctypes.c_size_t
    library.stub_set_limit.argtypes = library.stub_set_pinned_limit.argtypes = [ctypes.c_size_t]
    library.stub_launch.argtypes = [ctypes.c_ulonglong, ctypes.c_size_t, ctypes.c_void_p]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


@pytest.fixture
def cuda(driver: ctypes.CDLL) -> Iterator[Callable[..., Pages]]:
    """A factory of CUDA pages in a context of this thread. At the end, none of their resources may be left."""
    from runtime.engines.elastic.cuda_pages import CudaPages  # imports the driver, so the stub must be loaded first

    made: list[Pages] = []
    driver.cuCtxSetCurrent(1)

    def make(size_bytes: int, granule_bytes: int = 2 * MIB) -> Pages:
        made.append(CudaPages(size_bytes, granule_bytes=granule_bytes))
        return made[-1]

    yield make
    driver.stub_set_limit(ctypes.c_size_t(-1))
    for pages in made:
        pages.close()
        pages.close()
    driver.stub_hold(0)
    leaked = driver.stub_in_use(), driver.stub_mappings(), driver.stub_reservations(), driver.stub_events()
    assert leaked == (0, 0, 0, 0)
