"""The common parts of all engines that this process starts: the forkserver, their sockets, and vLLM's client side."""

import asyncio
import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Self

from runtime.engines import forkserver, startup_reports, temp_folder
from runtime.engines.handle import EngineState
from runtime.engines.spec import EngineSpec
from runtime.engines.vllm_import import import_with_vllm

SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"


class Launcher:
    """A context manager that several fleets can share. It outlives their engines.

    - `folder`: for the sockets of the engines, and for their temporary files.
    - `reports`: where the reports of an engine's start go, by the engine's name.

    `specs` are the engines that will be started, `run_folder` takes the forkserver's log.
    """

    def __init__(self, specs: Collection[EngineSpec], run_folder: Path) -> None:
        self.reports: dict[str, startup_reports.OnState] = {}
        self._specs = specs
        self._run_folder = run_folder
        self._preparing = asyncio.Lock()
        self._vllm_engine: ModuleType | None = None

    def __enter__(self) -> Self:
        with ExitStack() as owned:
            self.folder = owned.enter_context(temp_folder.folder())
            self._owned = owned.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._owned.close()

    async def prepare(self) -> ModuleType:
        """Start the forkserver and import vLLM's client side, once. Return the module with VllmEngine.

        The import takes seconds. The forkserver imports vLLM at the same time as a thread of this process. Raises
        EngineError if vLLM cannot be imported.
        """
        async with self._preparing:
            if self._vllm_engine is None:
                self._owned.callback(_put_sockets_in, os.environ.get(SOCKETS_VARIABLE))  # of a launcher around this one
                prepare_process(self._specs, self._run_folder, self.folder)
                module = await asyncio.to_thread(import_with_vllm, "runtime.engines.vllm_engine")
                self._owned.enter_context(startup_reports.listening(self.folder, self._report))
                self._vllm_engine = module
            return self._vllm_engine

    def _report(self, name: str, state: EngineState) -> None:
        if report := self.reports.get(name):
            report(state)


def prepare_process(specs: Collection[EngineSpec], run_folder: Path, temporary_folder: Path) -> None:
    """Set the environment variables that vLLM reads, and start the forkserver. Call this before importing vLLM."""
    _set_environment(specs)
    _put_sockets_in(str(temporary_folder))
    threads = max(1, len(os.sched_getaffinity(0)) // sum(spec.gpus for spec in specs))
    forkserver.start(run_folder / "engines.log", threads)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # in this process only; logs.log_to configures its logging


def _put_sockets_in(folder: str | None) -> None:
    if folder is None:
        os.environ.pop(SOCKETS_VARIABLE, None)
    else:
        os.environ[SOCKETS_VARIABLE] = folder


def prepare_head(specs: Collection[EngineSpec]) -> None:
    """Set the environment variables for a process that uses vLLM, and starts no engine. Call it before the import."""
    _set_environment(specs)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"


def _set_environment(specs: Collection[EngineSpec]) -> None:
    if all(spec.model.startswith("/") for spec in specs):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are local folders, so no hub needs to be asked
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", "60")  # from a loaded model to a first message; 600 is a hang
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
