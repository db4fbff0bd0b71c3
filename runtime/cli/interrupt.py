"""Ctrl-C and SIGTERM. The first one cancels the command's work or, if the work can drain, asks it to end by itself; a
second one ends the process at once."""

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
    """A run that a signal has ended. The exit code is 128 + `number`, the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


class Stop:
    """A request to end. Work that sets `ready` is not cancelled by a signal: `asked` is set instead."""

    def __init__(self) -> None:
        self.ready = False
        self.asked = asyncio.Event()


def run(work: Coroutine[Any, Any, T], stop: Stop | None = None) -> T:
    """Run work to its end, and return its result.

    Raises Interrupted once the work has cleaned up after a signal cancelled it. It runs on uvloop, which leaves more of
    the processor to engines on a CPU.
    """
    received: list[int] = []

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if received:
                os._exit(128 + number)  # the forkserver notices the end of this process, and ends the engines
            received.append(number)
            if stop is not None and stop.ready:
                doing = "finishing the running jobs"
                stop.asked.set()
            else:
                doing = "closing the engines"
                task.cancel()
            with suppress(OSError):  # the terminal may be closed
                click.echo(f"\n{doing} (interrupt again to end at once)", err=True)

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
