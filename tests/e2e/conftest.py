"""What the end-to-end tests share: the command as a user runs it, and the processes that it starts."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "configs" / "problems" / "sample.jsonl"
LONG_S = 600
"""Upper bound for waits that take seconds on an idle machine. Only a hang takes this long."""


class Command:
    """`troupe` in a folder of its own, and all processes that it has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []
        self._seen: set[psutil.Process] = set()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = {
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the first one, and vLLM sets it: engines keep their titles
            **os.environ,
            "TROUPE_HOME": str(folder / "home"),
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start the command in a session of its own, as a terminal does."""
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.cli.main", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        with self.start(*arguments) as process:
            watch = threading.Thread(target=self._watch, args=(process,))
            watch.start()
            out, err = process.communicate(timeout=LONG_S)
            watch.join()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def _watch(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            self.processes()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes: the commands, and every descendant that a call of this method has ever seen."""
        for root in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(root.pid)
                self._seen.update([parent, *parent.children(recursive=True)])
        return [process for process in self._seen if lives(process)]

    def engines(self) -> list[psutil.Process]:
        """Return the living engine processes, which vLLM names `EngineCore`."""
        return [process for process in self.processes() if "EngineCore" in "".join(process.cmdline())]

    def nothing_left(self) -> None:
        """Wait until every process has ended by itself. Fail after 60 s."""
        wait_until(lambda: not self.processes(), seconds=60)


def wait_until(holds: Callable[[], bool], seconds: float = LONG_S, describe: Callable[[], object] = str) -> None:
    """Wait until a condition holds. Fail after this many seconds, with a description of what is there instead."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s; {describe()}"
        time.sleep(0.05)


def lives(process: psutil.Process) -> bool:
    """Return True if a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def troupe(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture(scope="module")
def shared_troupe(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command in one folder that all tests of a module share."""
    return Command(tmp_path_factory.mktemp("shared"))


def results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a file, by id. Every line must be complete."""
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
