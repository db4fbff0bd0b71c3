"""Word from an engine's process while it starts: datagrams over a Unix socket.

vLLM's own channel opens when an engine is ready; of minutes of loading weights before that it says nothing.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.engines.handle import EngineState

NAME = "reports"
"""Of the socket, in the folder for temporary files."""
Take = Callable[[str, EngineState], None]


@contextmanager
def listening(folder: Path, take: Take) -> Iterator[None]:
    """Call `take`, on the running loop, with every report sent into the folder meanwhile."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setblocking(False)
        listener.bind(str(folder / NAME))

        def on_report() -> None:
            report = json.loads(listener.recv(4096))
            take(report["engine"], EngineState(report["state"]))

        # A reader and no datagram endpoint: uvloop has none for Unix sockets.
        loop.add_reader(listener, on_report)
        try:
            yield
        finally:
            loop.remove_reader(listener)


def send(folder: Path, engine: str, state: EngineState) -> None:
    """Report from an engine's process. Nobody listening is no error: the parent may be closing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.sendto(json.dumps({"engine": engine, "state": state}).encode(), str(folder / NAME))
