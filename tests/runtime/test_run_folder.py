"""Run folders: only the oldest folders of ended runs are removed."""

import fcntl
import os
import subprocess
import sys
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
    others = [home / "runs" / name for name in ("mine", "20250101", "20240101-000000-1", "zzz")]
    for folder in (*ended, *others):
        folder.mkdir(parents=True)
    running = os.open(others[2], os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    made = run_folder.create()
    assert made.is_dir()
    assert all(folder.is_dir() for folder in (*others, *ended[-run_folder.KEPT :]))
    assert not any(folder.exists() for folder in ended[: -run_folder.KEPT])
    os.close(running)


def test_a_run_that_is_killed_has_ended_even_if_its_process_id_is_in_use_again(home: Path) -> None:
    """In a container, each run has the same process id."""
    program = "from runtime import run_folder\nprint(run_folder.create())\nimport os\nos.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
    alive = run_folder.create()
    assert run_folder._has_ended(Path(killed))
    assert not run_folder._has_ended(alive)


def test_runs_that_start_together_keep_their_locks(home: Path) -> None:
    for number in range(25):
        (home / "runs" / f"20250101-0000{number:02d}-99999999").mkdir(parents=True)
    program = "from runtime import run_folder\nprint(run_folder.create(), flush=True)\ninput()"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    folders = [Path(process.stdout.readline().strip()) for process in started if process.stdout]
    assert len(set(folders)) == 8
    assert not any(run_folder._has_ended(folder) for folder in folders)
    for process in started:
        process.communicate("\n")
    assert all(run_folder._has_ended(folder) for folder in folders)


def test_a_folder_that_another_process_removes_meanwhile_is_left_alone(home: Path) -> None:
    assert not run_folder._has_ended(home / "runs" / "20250101-000000-1")


def test_unwritable_home_raises(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(TroupeError, match="Set TROUPE_HOME"):
        run_folder.create()
