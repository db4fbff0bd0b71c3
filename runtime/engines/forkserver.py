"""The process that every engine is forked from. It imports vLLM once, so that engines start fast and in parallel.

Python's own forkserver does the forking. This module adds:

- The forkserver starts while the parent is still importing.
- Its output and that of its children go to a file.
- The terminal's Ctrl-C does not reach it.
- No engine outlives the parent. The forkserver ends when the parent's end of its pipe closes, however the parent ended.
  The kernel then kills the engines (PR_SET_PDEATHSIG, which each child sets after the fork).
"""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import connection, forkserver, popen_forkserver, process, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType

PRELOAD = "runtime.engines.forkserver_preload"
LOG_VARIABLE, PARENT_VARIABLE = "TROUPE_FORKSERVER_LOG", "TROUPE_FORKSERVER_PARENT"
_main_lock = threading.Lock()
_BASE_MAX_BYTES = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""The longest path of a folder for temporary files in which multiprocessing can bind the forkserver's Unix socket."""


def start(log: Path, threads: int) -> None:
    """Start the forkserver, with its output in `log`, unless it already runs.

    Each engine gets `threads` OpenMP threads. Returns immediately, while the new process imports vLLM. The forkserver
    lives as long as this process. Later calls do not change its log file or number of threads.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update({LOG_VARIABLE: str(log), PARENT_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": str(threads)})
    # An engine's threads wait for each other many times a step. By default they spin for so long that a step of two
    # threads takes 1.6 times as long while other processes use the cores. On idle cores both settings are equally fast.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # A killed engine leaves semaphores behind. Python's resource tracker removes them; its warning would only confuse.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    _shorten_socket_path()
    forkserver.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def _shorten_socket_path() -> None:
    """Make multiprocessing bind its socket under /tmp if the path of TMPDIR is too long for a socket."""
    settings = process.current_process()._config  # type: ignore[attr-defined]  # util.get_temp_dir reads it
    if "tempdir" not in settings and len(os.fsencode(tempfile.gettempdir())) > _BASE_MAX_BYTES:
        folder = settings["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)


class _Popen(popen_forkserver.Popen):
    """A process handle that reads the exit code in one thread at a time.

    The exit code can be read only once, and vLLM watches its processes in a thread of its own. A second reader would
    get 255.
    """

    _reading = threading.Lock()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if flag != os.WNOHANG and self.returncode is None:
            connection.wait([self.sentinel])
        with self._reading:
            return super().poll(os.WNOHANG)


_started: ContextVar[list[process.BaseProcess] | None] = ContextVar("started", default=None)


@contextmanager
def started() -> Iterator[list[process.BaseProcess]]:
    """Collect the processes that tasks and threads begun in this context start, also after it has ended."""
    processes: list[process.BaseProcess] = []
    token = _started.set(processes)
    try:
        yield processes
    finally:
        _started.reset(token)


class EngineProcess(ForkServerProcess):
    """A process of the forkserver that does not run the parent's main module again."""

    def start(self) -> None:
        super().start()
        if (processes := _started.get()) is not None:
            processes.append(self)

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 (multiprocessing's name)
        with _no_main():
            return _Popen(process_obj)

    def run(self) -> None:
        """Close the pipe that tells the forkserver that the parent lives, then run in the new process.

        multiprocessing gives every child a copy of the parent's end, so that the forkserver outlives the parent while a
        child runs. Engines have to end with the parent.
        """
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]  # it has no public name
        super().run()


class EngineContext(ForkServerContext):
    """The multiprocessing context for vLLM. Its processes come from the forkserver."""

    Process = EngineProcess


def context() -> EngineContext:
    """Return the multiprocessing context for vLLM."""
    return EngineContext()


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the main module, which multiprocessing would otherwise import again in the child."""
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
