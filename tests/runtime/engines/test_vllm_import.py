"""Importing vLLM collects no garbage, because a collection holds up every thread."""

import gc
import sys
from pathlib import Path

import pytest

from runtime.engines.vllm_import import import_with_vllm
from runtime.errors import EngineError

LARGE = """
import gc
before = gc.get_stats()
parts = [[] for _ in range(200_000)]
after = gc.get_stats()
"""


def test_no_collection_runs_during_the_import_and_what_it_made_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_module.py").write_text(LARGE)
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    module = import_with_vllm("large_module")
    monkeypatch.delitem(sys.modules, "large_module")
    assert module.after == module.before
    assert gc.isenabled()
    assert gc.get_freeze_count() - frozen > 200_000


def test_a_module_that_cannot_be_imported_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"vLLM cannot be imported .*no_such_module.*; run `troupe doctor`"):
        import_with_vllm("no_such_module")
    assert gc.isenabled()
