"""Reports from an engine's process while it starts: datagrams over a Unix socket.

vLLM's own channel opens only when an engine is ready, which can be minutes later because of the weights.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.engines.handle import EngineState

NAME = "reports"
"""The socket's name in the folder for temporary files."""
OnReport = Callable[[str, EngineState], None]
"""Called with an engine's name and the state that it has entered."""
OnState = Callable[[EngineState], None]
"""Called with the state that one engine has entered."""


@contextmanager
def listening(folder: Path, on_report: OnReport) -> Iterator[None]:
    """Call `on_report` on the running loop for every report that is sent into the folder."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setblocking(False)
        listener.bind(str(folder / NAME))

        def receive() -> None:
            report = json.loads(listener.recv(4096))
            on_report(report["engine"], EngineState(report["state"]))

        # add_reader, because uvloop has no datagram endpoints for Unix sockets.
        loop.add_reader(listener, receive)
        try:
            yield
        finally:
            loop.remove_reader(listener)


def send(folder: Path, engine: str, state: EngineState) -> None:
    """Send a report from an engine's process. Ignore a missing listener, because the parent may be closing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.sendto(json.dumps({"engine": engine, "state": state}).encode(), str(folder / NAME))
