"""Run folders: only the oldest folders of ended runs are removed."""

import os
from pathlib import Path

import pytest

from runtime import run_folder
from runtime.errors import TroupeError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_only_the_oldest_folders_of_ended_runs_are_removed(home: Path) -> None:
    ended = [home / "runs" / f"20250101-0000{n:02d}-99999999" for n in range(25)]
    others = [home / "runs" / name for name in ("mine", "20250101", f"20240101-000000-{os.getpid()}", "zzz")]
    for folder in (*ended, *others):
        folder.mkdir(parents=True)
    made = run_folder.create()
    assert made.is_dir()
    assert all(folder.is_dir() for folder in (*others, *ended[-run_folder.KEPT :]))
    assert not any(folder.exists() for folder in ended[: -run_folder.KEPT])


def test_unwritable_home_raises(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(TroupeError, match="Set TROUPE_HOME"):
        run_folder.create()
