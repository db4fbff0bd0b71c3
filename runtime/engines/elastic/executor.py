"""Executors under which a resize can happen between two steps.

With one device, the worker is in the engine core's process. With several, each has a process of its own, a rank.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from vllm.config import VllmConfig
from vllm.utils.system_utils import get_mp_context
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from runtime.engines import startup_reports
from runtime.engines.elastic import core
from runtime.engines.elastic.settings import Settings
from runtime.engines.handle import EngineState

_KILLED = (-signal.SIGKILL, -signal.SIGTERM, 0)
"""Exit codes of a rank that was killed from outside. vLLM's handler of SIGTERM exits with 0."""


class InCoreExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's single-process executor under another name.

    vLLM's CPU platform replaces UniProcExecutor with an executor that starts a worker process. It keeps subclasses.
    """

    def _init_executor(self) -> None:
        """Set this process up (log, temporary folder, utility calls), then load the model."""
        with _loading(self.vllm_config):
            super()._init_executor()


class RanksExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's executor with a process for each device, which the engine core forks.

    `forkserver_preload` has the kernel kill a forked rank when the engine core ends.
    """

    def _init_executor(self) -> None:
        """Set this process up as the executor of one device does, then fork the ranks, which load the model."""
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would ask for a NUMA node for each rank
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if get_mp_context().get_start_method() != "fork":
            raise RuntimeError(
                "vLLM cannot fork the processes of this engine, for example under WSL or with numa_bind, and "
                "others could outlive it: leave out numa_bind, or set tensor_parallel_size to 1"
            )
        with _loading(self.vllm_config):
            super()._init_executor()
        for path in {path for worker in self.workers for path in _queues(worker.proc.pid)}:
            path.unlink(missing_ok=True)  # killed processes would leave it behind, and all have opened it

    @staticmethod
    def _ensure_worker_termination(worker_procs: list[BaseProcess]) -> None:
        """Kill the ranks. vLLM would wait 5 s for them to exit, and a rank blocked in a collective never exits.

        If one of them was killed, kill this process too, so that the client sees a kill rather than a crash.
        """
        ended = connection.wait([process.sentinel for process in worker_procs], timeout=0)
        for process in worker_procs:
            if process.sentinel in ended:
                process.join(1)  # its exit code comes a moment later
                if process.exitcode in _KILLED:
                    os.kill(os.getpid(), signal.SIGKILL)
        for process in worker_procs:
            process.kill()
        for process in worker_procs:
            process.join()


def _queues(pid: int) -> list[Path]:
    """Return the files of vLLM's queues in shared memory that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [Path(line[line.index("/dev/shm/psm_") :]) for line in lines if "/dev/shm/psm_" in line]


@contextmanager
def _loading(config: VllmConfig) -> Iterator[None]:
    settings: Settings = config.troupe_settings
    with settings.log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.tempdir = str(settings.temporary)
    startup_reports.send(settings.temporary, settings.name, EngineState.LOADING)
    core.install()
    yield
    startup_reports.send(settings.temporary, settings.name, EngineState.LOADED)
