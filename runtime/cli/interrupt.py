"""Ctrl-C and SIGTERM: the first cancels the work, which then closes its engines, or asks it to come to its end where it
knows how; a second ends the process at once."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import click
import uvloop

T = TypeVar("T")


class Interrupted(Exception):
    """The run was ended by a signal; 128 + its number is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


class Stop:
    """How work is asked to come to its end: once it is `ready` to be asked, `asked` is set, and it is not cancelled."""

    def __init__(self) -> None:
        self.ready = False
        self.asked = asyncio.Event()


def run(work: Coroutine[Any, Any, T], stop: Stop | None = None) -> T:
    """Run to the end, or raise Interrupted after the work has been cancelled and has cleaned up. On uvloop: what the
    loop takes of the processor, engines on a CPU do not have."""
    received: list[int] = []

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if received:
                os._exit(128 + number)  # the forkserver sees our end and takes the engines with it
            received.append(number)
            if stop is not None and stop.ready:
                doing = "letting what runs come to its end"
                stop.asked.set()
            else:
                doing = "closing the engines"
                task.cancel()
            with suppress(OSError):  # the screen may be gone
                click.echo(f"\n{doing} (once more to end at once)", err=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        return await work

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(guarded())
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise
