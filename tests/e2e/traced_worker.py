"""A worker that writes each of its steps to the file `steps` beside the engine's log, for tests."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from runtime.engines.elastic.cpu_worker import ElasticCPUWorker

FILE = "steps"
NAME = "tests.e2e.traced_worker.TracedWorker"


@dataclass(frozen=True)
class Step:
    """A step. Its times are on the clock of time.monotonic, and None until then.

    - `asked_s`: the engine asked for the device
    - `begun_s`: the engine began to compute
    - `computed_s`: it had computed
    - `ended_s`: it had released the device
    """

    engine: str
    pid: int
    sequences: int
    asked_s: float
    begun_s: float
    computed_s: float | None = None
    ended_s: float | None = None


def read(folder: Path) -> Sequence[Step]:
    """Return the steps in a folder, in the order in which they began."""
    lines = (folder / FILE).read_text().splitlines() if (folder / FILE).exists() else []
    steps = [Step(**json.loads(line)) for line in lines]
    latest = {
        (step.pid, step.begun_s): step for step in steps
    }  # a step is written when it begins and when it has ended
    return sorted(latest.values(), key=lambda step: step.begun_s)


class _Traced(CPUWorker):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's own worker, below the elastic one: its steps run while the engine has the device."""

    begun_s = computed_s = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.begun_s = time.monotonic()
        self.write(scheduler_output)
        output = super().execute_model(scheduler_output)
        self.computed_s = time.monotonic()
        return output

    def write(self, scheduler_output: SchedulerOutput, **times: float) -> None:
        raise NotImplementedError


class TracedWorker(ElasticCPUWorker, _Traced):
    """The elastic worker, which writes a step when it begins to compute and when it has ended."""

    asked_s = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self.asked_s = time.monotonic()
        output = super().execute_model(scheduler_output)
        self.write(scheduler_output, computed_s=self.computed_s, ended_s=time.monotonic())
        return output

    def write(self, scheduler_output: SchedulerOutput, **times: float) -> None:
        if self._warming_up or not scheduler_output.total_num_scheduled_tokens:
            return
        settings = self.vllm_config.troupe_settings
        sequences = len(scheduler_output.num_scheduled_tokens)
        step = Step(settings.name, os.getpid(), sequences, self.asked_s, self.begun_s, **times)
        with (settings.log.parent / FILE).open("a") as file:
            file.write(json.dumps(asdict(step)) + "\n")
