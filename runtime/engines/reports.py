"""Word from an engine's process while it starts: datagrams over a Unix socket.

vLLM's own channel opens when an engine is ready; of minutes of loading weights before that it says nothing.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from runtime.engines.base import EngineState

NAME = "reports"
"""Of the socket, in the folder for temporary files."""
Take = Callable[[str, EngineState], None]


class _Listener(asyncio.DatagramProtocol):
    def __init__(self, take: Take) -> None:
        self._take = take

    def datagram_received(self, data: bytes, address: object) -> None:
        report = json.loads(data)
        self._take(report["engine"], EngineState(report["state"]))


async def listen(folder: Path, take: Take) -> asyncio.DatagramTransport:
    """Call `take` with every report sent into the folder, until what is returned is closed."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Listener(take), local_addr=str(folder / NAME), family=socket.AF_UNIX
    )
    return transport


def send(folder: Path, engine: str, state: EngineState) -> None:
    """Report from an engine's process. Nobody listening is no error: the parent may be closing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.sendto(json.dumps({"engine": engine, "state": state}).encode(), str(folder / NAME))
