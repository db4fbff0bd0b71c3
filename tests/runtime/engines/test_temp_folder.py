"""The folder for what vLLM leaves behind: ours while we live, gone when we are."""

import os
import subprocess
import sys
import tempfile
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


def test_it_is_private_and_gone_at_the_end(base: Path) -> None:
    with temp_folder.folder() as folder:
        (folder / "socket").touch()
        assert folder.parent == base
        assert folder.stat().st_mode & 0o077 == 0
    assert list(base.iterdir()) == []


def test_what_a_killed_owner_left_goes_and_what_a_living_one_holds_stays(base: Path) -> None:
    mine = base / f"{temp_folder.PREFIX}backup"
    mine.mkdir()
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
    assert mine.is_dir()


def test_a_long_base_gives_way_to_a_short_one(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr(temp_folder, "PATH_MAX_BYTES", 10)
    with temp_folder.folder() as folder:
        assert folder.parent == Path("/tmp")
        socket = folder / "12345678-1234-1234-1234-123456789abc"
        assert len(os.fsencode(socket)) <= 107
    assert not folder.exists()
