"""Importing vLLM collects no garbage, because a collection holds up every thread."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engines.vllm_import import import_with_vllm
from runtime.errors import EngineError


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_no_collection_runs_during_the_import_and_what_it_made_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_module.py").write_text(
        "import gc\nparts = [[] for _ in range(200_000)]\ncounts = gc.get_stats()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_stats()
    frozen = gc.get_freeze_count()
    module = import_with_vllm("large_module")
    collections = [generation["collections"] for generation in before]
    assert [generation["collections"] for generation in module.counts] == [*collections[:2], collections[2] + 1]
    assert gc.isenabled()
    assert gc.get_freeze_count() - frozen > 200_000


def test_a_module_that_cannot_be_imported_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"vLLM cannot be imported .*no_such_module.*; run `troupe doctor`"):
        import_with_vllm("no_such_module")
    assert gc.isenabled()
