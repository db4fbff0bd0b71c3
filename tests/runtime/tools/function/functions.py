"""Functions that tests run as tools: good ones, and ones that harm the process that they run in."""

import asyncio
import ctypes
import os
import signal
import sys
import time
from enum import Enum
from pathlib import Path

from pydantic import BaseModel


class Unit(Enum):
    METRE = "m"


class Box(BaseModel):
    width: int
    unit: Unit = Unit.METRE


def area(box: Box, times: int = 1) -> str:
    """Return the types that arrive, and an area."""
    return f"{type(box).__name__} {box.unit!r} {box.width**2 * times}"


def boxes(count: int) -> list[Box]:
    """Return boxes."""
    return [Box(width=width) for width in range(count)]


async def slowly(text: str) -> str:
    """Return a text from a coroutine."""
    await asyncio.sleep(0)
    return text


def pid() -> int:
    """Return the process that runs this."""
    return os.getpid()


def pid_after(seconds: float) -> int:
    """Return the process that runs this, later."""
    time.sleep(seconds)
    return os.getpid()


def fails() -> str:
    """Raise."""
    raise ValueError("a bad\n  thing")


def leaves() -> str:
    """Ask Python to exit."""
    sys.exit(3)


def opaque() -> object:
    """Return what is no JSON."""
    return object()


def surrogate(fail: bool) -> str:
    """Return, or raise, text that UTF-8 cannot hold."""
    if fail:
        raise ValueError("\ud800")
    return "\ud800"


def controls(size: int) -> str:
    """Return the characters that are longest in JSON."""
    return "\0" * size


def long(size: int) -> str:
    """Return a long text."""
    return "é" * size


def hangs(file: str) -> str:
    """Write the PIDs of this process and of a daemon that it starts to a file; then never return."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(file).write_text(f"{os.getppid()} {os.getpid()}")
            time.sleep(1000)
        time.sleep(1000)
    time.sleep(1000)
    return ""


def daemon() -> int:
    """Start a daemon, and return its PID."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writing, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    return int(os.read(reading, 20))


def forks() -> str:
    """Return in two processes."""
    os.fork()
    return "forked"


def floods() -> str:
    """Print for ever."""
    while True:
        os.write(1, b"flood\n" * 10_000)


def prints_and_exits() -> str:
    """Print, and end the process."""
    os.write(1, b"last words\n")
    os._exit(7)


def segfaults() -> str:
    """Read address 0."""
    ctypes.string_at(0)
    return ""


def kills_itself() -> str:
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def closes_everything() -> str:
    """Close all files and hang."""
    os.closerange(0, 1000)
    time.sleep(1000)
    return ""


def writes_to_the_connection() -> str:
    """Write rubbish to every file that is open."""
    for number in range(3, 20):
        try:
            os.write(number, b"rubbish\n" * 200_000)
        except OSError:
            continue
    return "ok"


def stops_its_guard() -> str:
    """Stop the process that would end this one, and hang."""
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(1000)
    return ""


def closes_stdout() -> str:
    """Close standard output only."""
    os.close(1)
    return "still here"
