"""A program that talks in lines over its standard streams, run under a guard that ends it with all its descendants.

Its standard error goes to the log at debug level, bounded, and its last lines are kept for an error message.
"""

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Self

from runtime.tools.bounded_output import READ_BYTES
from runtime.tools.process import guard

STDERR_BYTES_PER_S = 4 << 20
"""A program that writes more to its standard error is slowed down to this, so that it cannot occupy the event loop."""

STDERR_LINE_CHARS = 500
STDERR_LINES_KEPT = 10
STDERR_REST_S = 0.2
"""The most seconds to read the standard error of a program that has ended."""

STDIN_GRACE_S = 2.0
"""The time that a program has to exit after its standard input is closed."""

KILLED_S = 2.0
"""The most seconds to wait for the exit status of a guard that was killed."""

_POLL_S = 0.01

logger = logging.getLogger(__name__)


class LineTooLong(Exception):
    """The program wrote a line that is longer than it may be."""


class GuardedProcess:
    """An async context manager that owns a program and its descendants.

    They end when it is left or when this process ends, by SIGKILL too. Leaving it takes up to 4 s for a program that
    ignores the end of its standard input and SIGTERM. Leaving does not wait for anyone to read the program's output.

    The program inherits no environment but `env`, or this process's if `env` is None.
    """

    def __init__(self, name: str, command: Sequence[str], line_max_bytes: int, env: Mapping[str, str] | None) -> None:
        self._name = name
        self._command = command
        self._env = env
        self._line_max_bytes = line_max_bytes
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._lifeline: int | None = None

    async def __aenter__(self) -> Self:
        """Start the program. A command that cannot be run ends with status 127 and says why on its standard error."""
        lifeline_read, self._lifeline = os.pipe()
        arguments = (str(lifeline_read), str(os.getpid()), *self._command)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._env,
                pass_fds=(lifeline_read,),
                start_new_session=True,  # the terminal's Ctrl-C must reach Troupe only
                limit=READ_BYTES,
            )
        except BaseException:
            self.end()
            raise
        finally:
            os.close(lifeline_read)
        self._stderr_task = asyncio.create_task(self._read_stderr(), name=f"{self._name}-stderr")
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            if self._process.stdin:
                self._process.stdin.close()
            if self._lifeline is not None:
                await self.exited(STDIN_GRACE_S)
            self.end()
            if not await self.exited(guard.GRACE_S + guard.GIVE_UP_S + 1):
                self._kill_if_unguarded()
                await self.exited(KILLED_S)
        finally:
            self.end()
            self._stderr_task.cancel()
            self._kill_if_unguarded()
            # asyncio offers no other way to close the pipes while a descendant in another session holds them.
            self._process._transport.close()  # type: ignore[attr-defined]

    def end(self) -> None:
        """Have the guard end the program and its descendants now. Does not wait."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    @property
    def running(self) -> bool:
        """Return False if the program is known to have ended or to have closed its standard output."""
        assert self._process.stdout is not None
        return self.status is None and not self._process.stdout.at_eof()

    @property
    def status(self) -> int | None:
        """The exit status as in a shell, or None while the program or one of its descendants runs."""
        return self._process.returncode

    def ending(self) -> str | None:
        """Return how the program ended, such as "with exit status 1" or "by SIGSEGV", or None if it has not ended."""
        if self.status is None:
            return None
        number = -self.status if self.status < 0 else self.status - guard.SIGNALLED
        with suppress(ValueError):
            return f"by {signal.Signals(number).name}"
        return f"with exit status {self.status}"

    def last_words(self) -> str:
        """Return the last lines of the standard error. They are complete once `exited` has returned True."""
        return "\n".join(self._stderr)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines of the standard output, without their ends. Raise LineTooLong after one that is too long."""
        assert self._process.stdout is not None
        line = bytearray()
        while chunk := await self._process.stdout.read(READ_BYTES):
            *complete, rest = chunk.split(b"\n")
            for part in complete:
                yield bytes(line + part)
                line.clear()
            line += rest
            if len(line) > self._line_max_bytes:
                raise LineTooLong

    async def write(self, data: bytes) -> None:
        """Write to the standard input. Wait while its buffer is full. Raise OSError if it is closed."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def exited(self, within_s: float) -> bool:
        """Wait until the program and its descendants have ended. Return False if they have not in this time.

        `Process.wait` would also wait until all pipes are closed. A descendant can delay that, and so does output that
        nobody reads: asyncio stops reading while its buffer is full, and does not see the end of the pipe.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while self._process.returncode is None and loop.time() < until_s:  # noqa: ASYNC110 (asyncio has no event)
            await asyncio.sleep(_POLL_S)
        if self._process.returncode is None:
            return False
        await asyncio.wait({self._stderr_task}, timeout=STDERR_REST_S)
        return True

    def _kill_if_unguarded(self) -> None:
        """Kill the process group if the guard hangs, or was killed itself."""
        if self.status in (None, -signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        loop = asyncio.get_running_loop()
        second, read_bytes = int(loop.time()), 0
        rest = b""
        while chunk := await self._process.stderr.read(READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:STDERR_LINE_CHARS]
            for line in lines[-STDERR_LINES_KEPT:]:
                self._note(line)
            read_bytes += len(chunk)
            if int(loop.time()) > second:
                second, read_bytes = int(loop.time()), 0
            elif read_bytes > STDERR_BYTES_PER_S:
                await asyncio.sleep(second + 1 - loop.time())
        self._note(rest)

    def _note(self, line: bytes) -> None:
        text = line[:STDERR_LINE_CHARS].decode(errors="replace").strip()
        if text:
            self._stderr.append(text)
            logger.debug("%s: %s", self._name, text)
