"""An executor that keeps the worker in the engine's process: one process an engine, and memory moves between steps."""

import os
import tempfile
from pathlib import Path

import torch
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from runtime.engines import startup_reports
from runtime.engines.elastic import core
from runtime.engines.handle import EngineState


class InCoreExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's single-process executor under a name of its own.

    The CPU platform replaces the one it knows by one that starts a worker process; a subclass it leaves alone.
    """

    def _init_executor(self) -> None:
        told = self.vllm_config.additional_config["troupe"]
        with Path(told["log"]).open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if current_platform.is_cpu():
            # AMX tiles need the kernel's leave, asked for in the process that uses them; without it the first token
            # of a bfloat16 model ends in SIGILL.
            torch.cpu._init_amx()
            if self.vllm_config.model_config.enforce_eager:
                # What vLLM compiles all the same would be built by a C++ compiler at the first request for logprobs:
                # seconds for all who wait, and no reply where there is none.
                torch.compiler.set_stance("force_eager")
        os.environ["TMPDIR"] = tempfile.tempdir = told["temporary"]
        startup_reports.send(Path(told["temporary"]), told["name"], EngineState.LOADING)
        core.install()
        super()._init_executor()
        startup_reports.send(Path(told["temporary"]), told["name"], EngineState.LOADED)
