"""The runtime's side of a worker: starts its process, sends calls, and ends it with all that it started."""

import asyncio
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from runtime.tools import supervisor, worker
from runtime.tools.bounded_output import READ_BYTES, LastOutput, with_notices
from runtime.tools.tool import ToolError

_END_S = 10
"""How long a supervisor may take to end its processes before it is killed itself."""

_EXIT_S = 2
"""How long to wait for the exit status of a worker that closed its connection."""

_PRINTED_BYTES = 4096


@dataclass(frozen=True)
class Answer:
    """The output of a call, or the message of its error if it failed."""

    text: str
    failed: bool


class WorkerProcess:
    """A worker, under a supervisor that ends every process of it. It runs one call at a time.

    It must be ended, by `end`, unless the runtime itself ends.
    """

    def __init__(self, process: Process, output_max_bytes: int) -> None:
        self._process = process
        self._text_max_bytes = max(output_max_bytes, worker.MESSAGE_MAX_BYTES)
        self._printed = LastOutput(_PRINTED_BYTES)
        self._draining = asyncio.create_task(self._drain(), name=f"output of tool worker {process.pid}")

    @classmethod
    async def start(cls, target: str, output_max_bytes: int) -> "WorkerProcess":
        """Start a worker for a function, "module:function". It may not have loaded it yet; `load` waits for that."""
        process = await asyncio.create_subprocess_exec(
            *supervisor.command(*worker.command(target, output_max_bytes)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            limit=READ_BYTES,
        )
        return cls(process, output_max_bytes)

    @property
    def alive(self) -> bool:
        """Return False if the process is known to have ended."""
        assert self._process.stdout is not None
        return self._process.returncode is None and not self._process.stdout.at_eof()

    async def load(self) -> None:
        """Wait until the function is loaded. Raise ToolError if it cannot be."""
        answer = await self._receive()
        if answer.failed:
            raise ToolError(answer.text)

    async def call(self, arguments: Mapping[str, Any]) -> Answer:
        """Run the function. Raise ToolError if the worker broke; it is then of no further use."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # the missing answer says more
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            await self._process.stdin.drain()
        return await self._receive()

    async def end(self) -> None:
        """End the worker and every process that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self._draining.cancel()
        await asyncio.wait([self._draining])

    async def _receive(self) -> Answer:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readuntil(b"\n")
            header = worker.Header.model_validate_json(line)
            if not 0 <= header.text_bytes <= self._text_max_bytes:
                raise ToolError("its process broke the protocol of the runtime")
            text = (await self._process.stdout.readexactly(header.text_bytes)).decode(errors="replace")
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ToolError(await self._end_of_process()) from None
        except (asyncio.LimitOverrunError, ValidationError):
            raise ToolError("its process broke the protocol of the runtime") from None
        return Answer(with_notices(text, header.cut_bytes), header.failed)

    async def _drain(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(READ_BYTES):
            self._printed.add(chunk)

    async def _end_of_process(self) -> str:
        """Return how the process ended before it answered, with the last line that it printed."""
        try:
            async with asyncio.timeout(_EXIT_S):
                code = await self._process.wait()
        except TimeoutError:
            return "its process closed the connection to the runtime"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        printed = self._printed.last_line()
        return f"its process ended {how} before it answered" + (f"; it last printed: {printed}" if printed else "")
