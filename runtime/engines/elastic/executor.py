"""An executor that keeps the worker in the engine core's process, so that a resize can happen between two steps."""

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
    """vLLM's single-process executor under another name.

    vLLM's CPU platform replaces UniProcExecutor with an executor that starts a worker process. It keeps subclasses.
    """

    def _init_executor(self) -> None:
        """Set this process up (log, temporary folder, CPU features, utility calls), then load the model."""
        settings = self.vllm_config.additional_config["troupe"]
        with Path(settings["log"]).open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if current_platform.is_cpu():
            # The process that uses AMX tiles must request permission from the kernel first. Without it, a bfloat16
            # model dies with SIGILL at its first token.
            torch.cpu._init_amx()
            if self.vllm_config.model_config.enforce_eager:
                # vLLM compiles some functions even in eager mode, with a C++ compiler at the first request for
                # logprobs. That would stall all requests for seconds, and fail without a compiler.
                torch.compiler.set_stance("force_eager")
        os.environ["TMPDIR"] = tempfile.tempdir = settings["temporary"]
        startup_reports.send(Path(settings["temporary"]), settings["name"], EngineState.LOADING)
        core.install()
        super()._init_executor()
        startup_reports.send(Path(settings["temporary"]), settings["name"], EngineState.LOADED)
