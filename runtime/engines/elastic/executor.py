"""Executors under which a resize can happen between two steps.

With one device, the worker is in the engine core's process. With several, each has a process of its own, a rank.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from vllm.config import VllmConfig
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from runtime.engines import startup_reports
from runtime.engines.elastic import core
from runtime.engines.handle import EngineState


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

    The kernel kills the ranks when the engine core ends: `forkserver_preload` sees to that.
    """

    def _init_executor(self) -> None:
        """Set this process up as the executor of one device does, then fork the ranks, which load the model."""
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would ask for a NUMA node for each rank
        with _loading(self.vllm_config):
            super()._init_executor()
        # On a CPU, the ranks share named memory, which a killed rank would leave behind. All have opened it now.
        for path in Path("/dev/shm").glob(f"{self.collective_rpc(_ident)[0]}*"):
            path.unlink(missing_ok=True)

    @staticmethod
    def _ensure_worker_termination(worker_procs: list[BaseProcess]) -> None:
        """Kill the ranks. vLLM waits for their goodbye first, and a rank never says it while another one is missing."""
        for process in worker_procs:
            process.kill()
        for process in worker_procs:
            process.join()


def _ident(_rank: object) -> str:
    return os.environ.get("VLLM_DIST_IDENT") or "none"  # of the shared memory of a rank and its group


@contextmanager
def _loading(config: VllmConfig) -> Iterator[None]:
    settings = config.additional_config["troupe"]
    with Path(settings["log"]).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.tempdir = settings["temporary"]
    startup_reports.send(Path(settings["temporary"]), settings["name"], EngineState.LOADING)
    core.install()
    yield
    startup_reports.send(Path(settings["temporary"]), settings["name"], EngineState.LOADED)
