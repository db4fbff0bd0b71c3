"""The process that every engine is forked from: it imports vLLM once, so that engines start in parallel and soon.

Python's own forkserver does the forking. What is ours: it is started while the parent is still importing, its output
and that of its children go to a file, the terminal's Ctrl-C does not reach it, and no engine outlives the parent.
The last is a chain: the forkserver ends when the parent's end of its pipe closes, however the parent ended, and the
kernel then kills the engines (PR_SET_PDEATHSIG, set in each child as it is forked).
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType

PRELOAD = "runtime.engines.preload"
LOG_VARIABLE, PARENT_VARIABLE = "TROUPE_FORKSERVER_LOG", "TROUPE_FORKSERVER_PARENT"
_main_lock = threading.Lock()


def start(log: Path, threads: int) -> None:
    """Start the forkserver if it does not run; its output goes to `log`.

    Each engine gets `threads` OpenMP threads. Returns at once; imports go on in the new process. It lives as long as
    this process, and keeps what it was started with.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update({LOG_VARIABLE: str(log), PARENT_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": str(threads)})
    # An engine that is killed leaves semaphores, which Python's own tracker removes; it need not tell the user so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    forkserver.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


class EngineProcess(ForkServerProcess):
    """A process of the forkserver that does not run the parent's main module again, whatever that is."""

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 (multiprocessing's name)
        with _no_main():
            return popen_forkserver.Popen(process_obj)

    def run(self) -> None:
        """In the new process: let go of the pipe by which the forkserver knows that the parent lives.

        multiprocessing hands the parent's end to every child, so that the forkserver outlives the parent while a child
        runs. Ours are to end with the parent.
        """
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]  # it has no public name
        super().run()


class EngineContext(ForkServerContext):
    """The multiprocessing context that vLLM is given."""

    Process = EngineProcess


def context() -> EngineContext:
    """The multiprocessing context whose processes come from the forkserver."""
    return EngineContext()


@contextmanager
def _no_main() -> Iterator[None]:
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
