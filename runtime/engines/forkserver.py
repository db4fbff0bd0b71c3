"""The process that every engine is forked from: it imports vLLM once, so that engines start in parallel and soon.

Python's own forkserver does the forking. What is ours: it is started while the parent is still importing, its output
and that of its children go to a file, the terminal's Ctrl-C does not reach it, and no engine outlives the parent.
The last is a chain: the forkserver ends when the parent's end of its pipe closes, however the parent ended, and the
kernel then kills the engines (PR_SET_PDEATHSIG, set in each child as it is forked).
"""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver, popen_forkserver, process, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType

PRELOAD = "runtime.engines.forkserver_preload"
LOG_VARIABLE, PARENT_VARIABLE = "TROUPE_FORKSERVER_LOG", "TROUPE_FORKSERVER_PARENT"
_main_lock = threading.Lock()
_BASE_MAX_BYTES = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""The longest folder for temporary files in which multiprocessing can bind the forkserver's Unix socket."""


def start(log: Path, threads: int) -> None:
    """Start the forkserver if it does not run; its output goes to `log`.

    Each engine gets `threads` OpenMP threads. Returns at once; imports go on in the new process. It lives as long as
    this process, and keeps what it was started with.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update({LOG_VARIABLE: str(log), PARENT_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": str(threads)})
    # An engine that is killed leaves semaphores, which Python's own tracker removes; it need not tell the user so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    _shorten_socket_path()
    forkserver.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def _shorten_socket_path() -> None:
    """Let multiprocessing bind its socket under /tmp if TMPDIR is too long for one."""
    settings = process.current_process()._config  # type: ignore[attr-defined]  # where util.get_temp_dir looks first
    if "tempdir" not in settings and len(os.fsencode(tempfile.gettempdir())) > _BASE_MAX_BYTES:
        folder = settings["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)


class _Popen(popen_forkserver.Popen):
    """Reads the exit code in one thread at a time. It can be read once only, and vLLM watches its processes in a thread
    of its own: whoever comes second would take it for 255."""

    _reading = threading.Lock()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if flag != os.WNOHANG and self.returncode is None:
            connection.wait([self.sentinel])
        with self._reading:
            return super().poll(os.WNOHANG)


class EngineProcess(ForkServerProcess):
    """A process of the forkserver that does not run the parent's main module again, whatever that is."""

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 (multiprocessing's name)
        with _no_main():
            return _Popen(process_obj)

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
