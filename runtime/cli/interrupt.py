"""Ctrl-C and SIGTERM: the first cancels the work, which then closes its engines; a second ends the process at once."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import click

T = TypeVar("T")


class Interrupted(Exception):
    """The run was ended by a signal; 128 + its number is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, or raise Interrupted after the work has been cancelled and has cleaned up."""
    received: list[int] = []

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if received:
                os._exit(128 + number)  # the forkserver sees our end and takes the engines with it
            received.append(number)
            task.cancel()
            with suppress(OSError):  # the screen may be gone
                click.echo("\nclosing the engines (once more to end at once)", err=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        return await work

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise
