"""All engines of a configuration: started side by side, closed together, whatever happens in between."""

import asyncio
import gc
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Self

from runtime.engines import forkserver, reports
from runtime.engines.base import EngineHandle, EngineSpec, EngineState
from runtime.errors import EngineError
from runtime.events import EngineChanged, Listener, ignore


class Fleet:
    """An async context manager over the engines; `engines` maps names to handles that are ready.

    Entering raises EngineError when one does not come up, after the others are closed again.
    """

    def __init__(self, specs: Mapping[str, EngineSpec], run_folder: Path, listener: Listener = ignore) -> None:
        self.engines: dict[str, EngineHandle] = {}
        self._specs = specs
        self._run_folder = run_folder
        self._tell = listener
        self._started_s = time.monotonic()

    async def __aenter__(self) -> Self:
        self._started_s = time.monotonic()
        for name in self._specs:
            self._changed(name, EngineState.STARTING)
        prepare_process(self._specs, self._run_folder)
        # vLLM takes seconds to import: here in a thread, and in the forkserver at the same time.
        module = await asyncio.to_thread(_import_vllm_engine)
        address, listener = await reports.listen(self._changed)
        self.engines = {
            name: module.VllmEngine(name, spec, self._run_folder, address) for name, spec in self._specs.items()
        }
        try:
            async with asyncio.TaskGroup() as group:
                for name, engine in self.engines.items():
                    group.create_task(self._start(name, engine), name=f"start {name}")
        except BaseExceptionGroup as failures:
            await self._close()
            raise failures.exceptions[0] from None
        except BaseException:
            await self._close()
            raise
        finally:
            listener.close()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    async def _start(self, name: str, engine: EngineHandle) -> None:
        await engine.start()
        self._changed(name, EngineState.READY)

    async def _close(self) -> None:
        engines, self.engines = self.engines, {}
        await asyncio.gather(*(engine.close() for engine in engines.values()))
        for name in engines:
            self._changed(name, EngineState.CLOSED)
        shutil.rmtree(_temporary_folder(os.getpid()), ignore_errors=True)
        gc.unfreeze()  # what was frozen with the import; the interpreter's end wants to find it

    def _changed(self, name: str, state: EngineState) -> None:
        self._tell(EngineChanged(name, state, time.monotonic() - self._started_s))


def _temporary_folder(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"troupe-engines-{pid}"


def _make_temporary_folder() -> Path:
    """For the sockets and files that vLLM leaves behind; what is left of processes that were killed goes too."""
    folder = _temporary_folder(os.getpid())
    for old in folder.parent.glob("troupe-engines-*"):
        if not Path("/proc", old.name.removeprefix("troupe-engines-")).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _import_vllm_engine() -> ModuleType:
    """Import vLLM's client side without looking for garbage in it, then or ever."""
    gc.disable()
    try:
        return importlib.import_module("runtime.engines.vllm_engine")
    finally:
        gc.freeze()
        gc.enable()


def prepare_process(specs: Mapping[str, EngineSpec], run_folder: Path) -> None:
    """Set what vLLM reads from the environment, and start the forkserver; before vLLM is imported."""
    if not Path("/proc/self").exists():
        raise EngineError("engines run on Linux alone")
    run_folder.mkdir(parents=True, exist_ok=True)
    if all(spec.model.startswith("/") for spec in specs.values()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are folders: no hub needs asking
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    temporary = _make_temporary_folder()
    os.environ["VLLM_RPC_BASE_PATH"] = str(temporary)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = max(1, len(os.sched_getaffinity(0)) // len(specs))
    forkserver.start(run_folder / "engines.log", temporary, threads)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # in this process; see run_folder.log_to
