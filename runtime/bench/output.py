"""A benchmark's folder while it runs: rows go to their files as they come, so that an interrupted one keeps them."""

import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

import psutil

from runtime.bench import results
from runtime.bench.results import JobRow, Moment
from runtime.errors import InputError


class Output:
    """A context manager over the files. Raises InputError where the folder cannot be made or holds a benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owned = ExitStack()
        self._jobs: IO[bytes]
        self._moments: IO[bytes]

    def __enter__(self) -> Self:
        if (self.folder / results.SUMMARY).exists():
            raise InputError(f"--out: {self.folder} holds a benchmark already; give another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._jobs = self._owned.enter_context((self.folder / results.JOBS).open("wb"))
            self._moments = self._owned.enter_context((self.folder / results.DECISIONS).open("wb"))
        except OSError as error:
            raise InputError(f"--out: {self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._owned.close()

    def job(self, row: JobRow) -> None:
        """Add a job."""
        self._jobs.write(results.job_line(row))

    def moment(self, moment: Moment) -> None:
        """Add what the controller saw and did."""
        self._moments.write(results.moment_line(moment))


def default_folder(workload: str) -> Path:
    """Where results go unless told: a folder of its own under the current one."""
    return Path(f"bench-{workload}-{time.strftime('%Y%m%d-%H%M%S')}")


def machine() -> Mapping[str, str]:
    """What it ran on, without names of hosts or users."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def command() -> str:
    """The command that makes it again."""
    return " ".join(["troupe", *sys.argv[1:]])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
