"""The runtime's side of a worker: starts its process, sends calls, and ends it with all that it started."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from runtime.tools.function import worker
from runtime.tools.function.worker import Answer
from runtime.tools.process.guarded_process import GuardedProcess, LineTooLong
from runtime.tools.tool import ToolError

_EXIT_S = 2
"""The most seconds to wait for the exit status of a worker that closed its connection."""


class WorkerProcess:
    """A worker, under a guard that ends every process of it. It runs one call at a time.

    It must be ended, by `end`, unless the runtime itself ends.
    """

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process
        self._lines = process.lines()

    @classmethod
    async def start(cls, name: str, target: str, output_max_bytes: int) -> "WorkerProcess":
        """Start a worker for a function, "module:function". It may not have loaded it yet; `load` waits for that."""
        command = worker.command(target, output_max_bytes)
        process = GuardedProcess(f"tool-{name}", command, worker.answer_max_bytes(output_max_bytes), env=None)
        return cls(await process.__aenter__())

    @property
    def alive(self) -> bool:
        """Return False if the process is known to have ended."""
        return self._process.running

    async def load(self) -> None:
        """Wait until the function is loaded. Raise ToolError if it cannot be."""
        answer = await self._answer()
        if answer.failed:
            raise ToolError(answer.text)

    async def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Run the function. Raise ToolError if the worker broke; it is then of no further use."""
        with suppress(OSError):  # the missing answer says more
            await self._process.write(json.dumps(arguments).encode() + b"\n")
        return await self._answer()

    async def end(self) -> None:
        """End the worker and every process that it started."""
        self._process.end()
        await self._process.__aexit__()

    async def _answer(self) -> Answer:
        try:
            return Answer.model_validate_json(await anext(self._lines))
        except StopAsyncIteration:
            raise ToolError(await self._why_it_ended()) from None
        except (LineTooLong, ValidationError):
            raise ToolError("its process broke the protocol of the runtime") from None

    async def _why_it_ended(self) -> str:
        """Return how the process ended before it answered, with the last line that it printed."""
        if not await self._process.exited(_EXIT_S):
            return "its process closed the connection to the runtime"
        printed = self._process.last_words().rpartition("\n")[2]
        return f"its process ended {self._process.ending()} before it answered" + (
            f"; it last printed: {printed}" if printed else ""
        )
