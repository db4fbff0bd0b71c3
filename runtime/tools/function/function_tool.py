"""A tool that is a plain Python function, run in processes of its own."""

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic import ByteSize, Field

from agents.role import Value
from agents.tool import ToolSpec
from runtime.tools.function.worker_process import WorkerProcess
from runtime.tools.tool import Tool, ToolError

WORKERS = 4
"""The most calls of a tool at a time, each in a worker of its own. Further calls wait."""

LOAD_S = 60
"""The most seconds that a worker may take to import the function."""


class FunctionTool(Tool):
    """A tool that runs a function, sync or async, given as "module:function".

    A worker starts when a call needs one, since a tool may never be called and each worker is a Python process with the
    function's imports. Later calls reuse it. A call that fails to end in `timeout_s`, or that is cancelled, ends its
    worker and all processes below it; other calls do not notice.

    The output is the string that the function returns, or another value as JSON. Beyond `output_max_bytes` it is cut,
    and a line says so.
    """

    class Options(Value):
        """The limits of a call."""

        timeout_s: float = Field(
            default=30, gt=0, le=86400, description="The longest that a call may take, in seconds."
        )
        output_max_bytes: ByteSize = Field(
            default=ByteSize(8192), ge=64, le=1 << 20, description="The most output that the model reads."
        )

    def __init__(self, spec: ToolSpec, target: str, options: Options | None = None) -> None:
        options = options or self.Options()
        self.spec = spec
        self._target = target
        self._timeout_s = options.timeout_s
        self._output_max_bytes = options.output_max_bytes
        self._slots = asyncio.Semaphore(WORKERS)
        self._idle: list[WorkerProcess] = []
        self._workers: set[WorkerProcess] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._left = False

    async def __aexit__(self, *exc: object) -> None:
        self._left = True
        for worker in self._workers:
            self._start_to_end(worker)
        for _ in range(WORKERS):  # wait for the calls under way, also for those that were just starting a worker
            await self._slots.acquire()
        while self._ending:
            await asyncio.wait(self._ending)

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Run the function, which gets the arguments as its declared types, and return its output.

        Raise ToolError if it raises, takes too long, returns no JSON, or ends its process.
        """
        self._check_open()
        async with self._slots:
            worker = await self._worker()
            answer = None
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await worker.call(arguments)
            except TimeoutError:
                raise ToolError(f"{self.spec.name} did not end within {self._timeout_s:g} s") from None
            except ToolError as error:
                raise ToolError(f"{self.spec.name} failed: {error}") from None
            finally:
                if answer is not None:
                    self._idle.append(worker)
                else:
                    await self._end(worker)
        if answer.failed:
            raise ToolError(answer.text)
        return answer.text

    def _check_open(self) -> None:
        if self._left:
            raise ToolError(f"{self.spec.name} cannot be called: the runtime is stopping")

    async def _worker(self) -> WorkerProcess:
        """Return an idle worker, or else a new one. Raise ToolError if it cannot load the function."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            await self._end(worker)
        worker = await WorkerProcess.start(self.spec.name, self._target, self._output_max_bytes)
        self._workers.add(worker)
        loaded = False
        try:
            self._check_open()
            async with asyncio.timeout(LOAD_S):
                await worker.load()
            loaded = True
        except TimeoutError:
            raise ToolError(f"{self._target} was not imported within {LOAD_S} s") from None
        finally:
            if not loaded:
                await self._end(worker)
        return worker

    async def _end(self, worker: WorkerProcess) -> None:
        """End a worker, even if the caller is cancelled meanwhile."""
        await asyncio.shield(self._start_to_end(worker))

    def _start_to_end(self, worker: WorkerProcess) -> asyncio.Task[None]:
        async def end() -> None:
            await worker.end()
            self._workers.discard(worker)

        task = asyncio.create_task(end(), name=f"end of a worker of {self.spec.name}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task
