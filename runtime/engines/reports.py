"""Word from an engine's process while it starts: datagrams over a Unix socket of the abstract namespace, no file.

vLLM's own channel opens when an engine is ready; of minutes of loading weights before that it says nothing.
"""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from itertools import count

from runtime.engines.base import EngineState

Take = Callable[[str, EngineState], None]
_numbers = count()


class _Listener(asyncio.DatagramProtocol):
    def __init__(self, take: Take) -> None:
        self._take = take

    def datagram_received(self, data: bytes, address: object) -> None:
        report = json.loads(data)
        self._take(report["engine"], EngineState(report["state"]))


async def listen(take: Take) -> tuple[str, asyncio.DatagramTransport]:
    """Call `take` with every report; return the address to report to, and what to close in the end."""
    address = f"\0troupe-{os.getpid()}-{next(_numbers)}"
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Listener(take), local_addr=address, family=socket.AF_UNIX
    )
    return address, transport


def send(address: str, engine: str, state: EngineState) -> None:
    """Report from an engine's process. Nobody listening is no error: the parent may be closing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(json.dumps({"engine": engine, "state": state}).encode(), address)
        except OSError:
            return
