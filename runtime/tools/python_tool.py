"""The tool `python`: runs code that a model wrote, in the sandbox."""

import asyncio
import itertools
import math
import os
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field

from agents.role import Value
from agents.tool import ToolSpec
from runtime.tools.bounded_output import READ_BYTES, BoundedOutput, LastOutput
from runtime.tools.sandbox import jail
from runtime.tools.sandbox.protections import ENVIRONMENT, detect
from runtime.tools.tool import Tool, ToolError

CALLS = 4
"""The most calls at a time. Further ones wait."""

_FLOOD_BYTES = 16 << 20
"""Code that prints more than this is ended, because reading it takes time from everything else."""

_SETUP_S = 60
_DESCRIPTION = """\
Run Python code and return what it prints, the value of the last expression, and the traceback if it raises.
Each call starts a new interpreter with the standard library only, in an empty folder, without network."""


class PythonTool(Tool):
    """A tool that runs the code of each call in a new process, which the sandbox isolates and limits."""

    class Options(Value):
        """The limits of a call."""

        timeout_s: float = Field(default=10, gt=0, le=600, description="The longest that code may run, in seconds.")
        memory_bytes: ByteSize = Field(
            default=ByteSize(256 << 20),
            ge=64 << 20,
            le=1 << 40,
            description="The most memory of a call, in bytes, including 30 MiB for the interpreter.",
        )
        threads: int = Field(
            default=16, ge=1, le=1024, description="The most threads of a call. It can start no other process."
        )
        file_max_bytes: ByteSize = Field(
            default=ByteSize(16 << 20),
            ge=4096,
            le=1 << 40,
            description="The most that a file may hold, in bytes; also all files together, if namespaces work here.",
        )
        output_max_bytes: ByteSize = Field(
            default=ByteSize(8192), ge=1, le=1 << 20, description="The most output that the model reads, in bytes."
        )

    spec = ToolSpec(
        name="python",
        description=_DESCRIPTION,
        parameters={
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code to run."}},
            "required": ["code"],
            "additionalProperties": False,
        },
        idempotent=True,
    )

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or self.Options()
        self._slots = asyncio.Semaphore(CALLS)
        self._running: set[Process] = set()
        self._left = False

    @staticmethod
    def fault() -> str | None:
        """Return why this machine cannot isolate code well enough, or None. The first call takes a moment."""
        found = detect()
        if found.suffices:
            return None
        return (
            "the python tool needs Linux on x86-64 with seccomp, and with Landlock (Linux 6.2) or namespaces that this "
            f"user may create: {'; '.join(found.faults)}"
        )

    async def __aenter__(self) -> "PythonTool":
        """Find out what can be enforced here. Raise ToolError if it is too little."""
        if fault := await asyncio.to_thread(self.fault):
            raise ToolError(fault)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._left = True
        for process in self._running:
            _kill(process)
        for _ in range(CALLS):  # wait for the calls under way, also for those that were just starting a process
            await self._slots.acquire()

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Run `arguments["code"]`, and return its output. The output ends with a line about the limit that ended it.

        Raise ToolError if the sandbox cannot be set up or the runtime is stopping.
        """
        self._check_open()
        async with self._slots, _new_folder() as folder, self._started(folder) as process:
            await _set_up(process, arguments["code"])
            output = BoundedOutput(self._options.output_max_bytes)
            return output.text(await self._ending(process, output))

    @asynccontextmanager
    async def _started(self, folder: str) -> AsyncIterator[Process]:
        """Start the sandbox with a new folder, and end every process of it in the end."""
        process = await asyncio.create_subprocess_exec(
            *jail.command(await self._settings(folder)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=ENVIRONMENT,
            start_new_session=True,
            limit=READ_BYTES,
        )
        self._running.add(process)
        try:
            self._check_open()
            yield process
        finally:
            _kill(process)
            await _discard_output(process)
            await process.wait()
            self._running.discard(process)

    def _check_open(self) -> None:
        if self._left:
            raise ToolError("python cannot be called: the runtime is stopping")

    async def _settings(self, folder: str) -> jail.Settings:
        found = await asyncio.to_thread(detect)
        if not found.suffices:
            raise ToolError(str(self.fault()))
        return jail.Settings(
            folder=folder,
            parent=os.getpid(),
            namespaces=found.namespaces,
            landlock=found.landlock,
            memory_bytes=self._options.memory_bytes,
            cpu_s=math.ceil(self._options.timeout_s) + 1,
            file_max_bytes=self._options.file_max_bytes,
            threads=self._options.threads,
        )

    async def _ending(self, process: Process, output: BoundedOutput) -> str:
        """Collect the output of code until it ends or reaches a limit, and return a line if it did not end well."""
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._options.timeout_s):
                while chunk := await process.stdout.read(READ_BYTES):
                    output.add(chunk)
                    if output.total_bytes > _FLOOD_BYTES:
                        return f"ended after {output.total_bytes} bytes of output: the output limit"
                return _meaning(await process.wait())
        except TimeoutError:
            return f"ended after {self._options.timeout_s:g} s: the time limit"


async def _set_up(process: Process, code: str) -> None:
    """Hand over the code, and wait until it starts to run. Raise ToolError if it does not."""
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(code.encode(errors="replace"))
    process.stdin.write_eof()
    report = LastOutput(READ_BYTES)
    try:
        async with asyncio.timeout(_SETUP_S):
            while chunk := await process.stderr.read(READ_BYTES):
                report.add(chunk)
    except TimeoutError:
        raise ToolError(f"the sandbox was not set up within {_SETUP_S} s; the machine may be overloaded") from None
    if fault := report.last_line():
        raise ToolError(f"the sandbox could not be set up: {fault}")


def _meaning(exit_code: int) -> str:
    """Return a line about how code ended, or nothing if it ended well."""
    if exit_code >= 0:
        return f"ended with exit status {exit_code}" if exit_code else ""
    match signal.Signals(-exit_code):
        case signal.SIGXCPU:
            return "ended for its CPU time: the time limit"
        case signal.SIGSEGV:
            return "ended by SIGSEGV: the stack is full, or native code failed"
        case other:
            return f"ended by {other.name}"


def _kill(process: Process) -> None:
    """End all processes of a sandbox. They cannot leave their process group."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _discard_output(process: Process) -> None:
    """Read what a killed process had written. Until then, its `wait` would not return: asyncio waits for the pipes."""
    for stream in (process.stdout, process.stderr):
        while stream is not None and await stream.read(READ_BYTES):
            pass


@asynccontextmanager
async def _new_folder() -> AsyncIterator[str]:
    folder = tempfile.mkdtemp(prefix="troupe-sandbox-")  # not in a thread, where a cancelled call would leave it behind
    try:
        yield folder
    finally:
        await asyncio.shield(asyncio.to_thread(_delete, Path(folder)))  # also if the call is cancelled meanwhile


def _delete(folder: Path) -> None:
    """Delete a folder, in which code may have made folders that cannot be listed, or that are nested without end.

    Each folder is moved out of the one around it first, because the path of a nested one can be too long.
    """
    with tempfile.TemporaryDirectory(prefix="troupe-sandbox-", dir=folder.parent) as flat:
        numbers = itertools.count()
        folders = [folder]
        while folders:
            path = folders.pop()
            with suppress(OSError):
                path.chmod(0o700)
                for nested in list(path.iterdir()):
                    if nested.is_dir() and not nested.is_symlink():
                        nested.chmod(0o700)  # moving a folder changes it
                        folders.append(nested.rename(Path(flat, str(next(numbers)))))
                    else:
                        nested.unlink()
                path.rmdir()
