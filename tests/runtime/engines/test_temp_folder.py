"""The temporary folder for vLLM's files: private, removed at the end, and cleaned up after a killed owner."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engines import temp_folder

HOLDER = """
import time
from runtime.engines import temp_folder
temp_folder.PATH_MAX_BYTES = 500
with temp_folder.folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "t"
    base.mkdir()
    monkeypatch.setenv("TMPDIR", str(base))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(temp_folder, "PATH_MAX_BYTES", 500)
    return base


def test_the_folder_is_private_and_removed_at_the_end(base: Path) -> None:
    with temp_folder.folder() as folder:
        (folder / "socket").touch()
        assert folder.parent == base
        assert folder.stat().st_mode & 0o077 == 0
    assert list(base.iterdir()) == []


def test_the_folder_of_a_killed_owner_is_removed_and_that_of_a_living_one_stays(base: Path) -> None:
    foreign = base / f"{temp_folder.PREFIX}backup"
    foreign.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        with temp_folder.folder():
            assert held.is_dir()
        holder.kill()
        holder.wait()
        assert held.is_dir()
        with temp_folder.folder() as folder:
            assert not held.exists()
            assert folder.is_dir()
    assert foreign.is_dir()


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(mkdtemp: Callable[..., str] = tempfile.mkdtemp, **options: str) -> str:
        made.append(mkdtemp(**options))
        if len(made) == 1:
            temp_folder._remove_abandoned(base)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    with temp_folder.folder() as folder:
        assert folder.is_dir()
        assert not Path(made[0]).exists()
    assert list(base.iterdir()) == []


def test_a_long_tmpdir_is_replaced_by_tmp(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr(temp_folder, "PATH_MAX_BYTES", 10)
    with temp_folder.folder() as folder:
        assert folder.parent == Path("/tmp")
        socket = folder / "12345678-1234-1234-1234-123456789abc"
        assert len(os.fsencode(socket)) <= 107
    assert not folder.exists()
