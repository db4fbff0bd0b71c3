"""The folder of a running benchmark. It writes rows as they come, so an interrupted benchmark keeps them."""

import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Self

import psutil

from runtime.bench import results
from runtime.bench.results import JobRow, Moment
from runtime.errors import InputError


class Output:
    """A context manager that creates the folder and owns its files. If `emulated`, every row says so.

    Entering raises InputError if the folder cannot be created or already holds a benchmark.
    """

    def __init__(self, folder: Path, emulated: bool = False) -> None:
        self.folder = folder
        self._emulated = emulated
        self._owned = ExitStack()
        self._jobs: IO[bytes]
        self._moments: IO[bytes]

    def __enter__(self) -> Self:
        if (self.folder / results.SUMMARY).exists():
            raise InputError(f"--out: {self.folder} already holds a benchmark; give another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._jobs = self._owned.enter_context((self.folder / results.JOBS).open("wb"))
            self._moments = self._owned.enter_context((self.folder / results.DECISIONS).open("wb"))
        except OSError as error:
            raise InputError(f"--out: cannot write to {self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._owned.close()

    def job(self, row: JobRow) -> None:
        """Write a job to `jobs.jsonl`."""
        self._jobs.write(results.job_line(replace(row, emulated=self._emulated)))

    def moment(self, moment: Moment) -> None:
        """Write a tick of the controller to `decisions.jsonl`."""
        self._moments.write(results.moment_line(replace(moment, emulated=self._emulated)))


def default_folder(workload: str) -> Path:
    """Return the folder for results if none is given: a new one in the current folder, named by workload and time."""
    return Path(f"bench-{workload}-{time.strftime('%Y%m%d-%H%M%S')}")


def machine() -> Mapping[str, str]:
    """Return what the benchmark runs on, without names of hosts or users."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def command() -> str:
    """Return the command that repeats this benchmark."""
    return " ".join(["troupe", *sys.argv[1:]])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
