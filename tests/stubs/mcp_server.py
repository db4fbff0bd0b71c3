"""An MCP server for tests: python mcp_server.py [http PORT]. Its tools do what tools of other people do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
from mcp import types
from mcp.server.mcpserver import MCPServer

server = MCPServer("stub", log_level="ERROR")


@server.tool(annotations=types.ToolAnnotations(read_only_hint=True, idempotent_hint=True))
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool(structured_output=False)
def pid() -> str:
    """Return the process id of the server."""
    return str(os.getpid())


@server.tool(structured_output=False)
async def wait(note: str, seconds: float = 3600) -> str:
    """Append a line to a file, wait, and append another; `cancelled` if the wait is cancelled."""
    with Path(note).open("a") as file:  # noqa: ASYNC230 (a line is written at once)
        print("started", file=file, flush=True)
        try:
            await anyio.sleep(seconds)
        except BaseException:
            print("cancelled", file=file, flush=True)
            raise
        print("ended", file=file, flush=True)
    return "waited"


@server.tool(structured_output=False)
async def block(note: str) -> str:
    """Hang the whole server."""
    Path(note).write_text("started")  # noqa: ASYNC240 (as above)
    time.sleep(3600)  # noqa: ASYNC251 (which is the point)
    return "unblocked"


@server.tool(structured_output=False)
async def leave() -> str:
    """End the server in the middle of a call."""
    os._exit(3)


@server.tool(structured_output=False)
def child() -> str:
    """Start a child in a session of its own, which ignores SIGTERM and the end of its input. Return its process id."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(3600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return str(process.pid)


@server.tool(structured_output=False)
def fail(reason: str) -> str:
    """Fail."""
    raise ValueError(reason)


@server.tool(structured_output=False)
def text(size: int) -> str:
    """Return a text of this many characters of two bytes each."""
    return "ä" * size


@server.tool(structured_output=False)
def environment() -> str:
    """Return the server's environment."""
    return json.dumps(dict(os.environ))


@server.tool()
def table() -> dict[str, int]:
    """Return structured content."""
    return {"rows": 2}


@server.tool(structured_output=False)
def media() -> list[Any]:
    """Return content of every kind."""
    return [
        types.TextContent(text="first"),
        types.ImageContent(data="QUJD", mime_type="image/png"),
        types.AudioContent(data="QUJD", mime_type="audio/wav"),
        types.ResourceLink(uri="file:///a.txt", name="a"),
        types.EmbeddedResource(
            resource=types.TextResourceContents(uri="file:///b.txt", text="secret", mime_type="text/plain")
        ),
        types.TextContent(text="last"),
    ]


@server.tool(structured_output=False)
def noise(size: int) -> str:
    """Write this many bytes to standard error."""
    for _ in range(size >> 10):
        sys.stderr.write("e" * 1023 + "\n")
    sys.stderr.flush()
    return "written"


if __name__ == "__main__":
    if sys.argv[1:2] == ["http"]:
        server.run("streamable-http", port=int(sys.argv[2]))
    else:
        server.run()
