"""Programs under the guard: their lines, their status, and their end."""

import asyncio
import os
import sys

import psutil
import pytest

from runtime.tools.process.guarded_process import GuardedProcess, LineTooLong

STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(3600)
"""


def python(code: str, line_max_bytes: int = 1 << 20) -> GuardedProcess:
    return GuardedProcess("program", (sys.executable, "-c", code), line_max_bytes, {"PATH": os.environ["PATH"]})


async def test_program_that_ignores_its_input_and_sigterm_is_ended() -> None:
    async with python(STUBBORN) as process:
        pid = int(await anext(process.lines()))
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_lines_and_status_are_the_programs() -> None:
    async with python("import sys; print(sys.stdin.readline() * 2 + 'x', end=''); sys.exit(7)") as process:
        await process.write("ä\n".encode())
        assert [line async for line in process.lines()] == ["ä".encode(), "ä".encode()]  # the last line has no end
        assert await process.exited(30)
        assert process.status == 7
        assert process.ending() == "with exit status 7"


async def test_program_that_is_killed_counts_as_in_a_shell() -> None:
    async with python("import os; os.kill(os.getpid(), 9)") as process:
        assert await process.exited(30)
        assert process.status == 128 + 9
        assert process.ending() == "by SIGKILL"


async def test_too_long_line_is_refused() -> None:
    async with python("print('x' * 200_000)", line_max_bytes=100_000) as process:
        with pytest.raises(LineTooLong):
            _ = [line async for line in process.lines()]


async def test_last_words_are_bounded() -> None:
    code = "import sys\nfor n in range(100): print(n, 'e' * 10_000, file=sys.stderr)"
    async with python(code) as process:
        assert await process.exited(30)
    words = process.last_words()
    assert "99 e" in words
    assert len(words) < 10_000


FLOOD = """
import os, threading
threading.Thread(target=lambda: [os.write(2, bytes(1 << 16)) for _ in iter(int, 1)]).start()
while True: os.write(1, bytes(1 << 16))
"""


async def test_leaving_does_not_wait_for_output_that_nobody_reads() -> None:
    for _ in range(3):
        async with asyncio.timeout(60), python(FLOOD) as process:
            await asyncio.sleep(0.5)  # the buffers of both pipes are full
    assert process.status is not None
