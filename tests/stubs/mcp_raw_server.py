"""A server for tests that speaks MCP by hand, and wrongly if told so: python mcp_raw_server.py BEHAVIOUR [FOLDER].

It has the tools `echo`, `odd` and `other`, on a page each. BEHAVIOUR says what it does at a call of `odd`.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"value": {}}}
behaviour = sys.argv[1]
tools = [{"name": name, "description": name, "inputSchema": SCHEMA} for name in ("echo", "odd", "other")]


def send(**message: Any) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def result(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


def misbehave(id: int) -> None:
    match behaviour:
        case "invalid":
            send(id=id, result={"content": "not a list"})
        case "image":
            content = [{"type": "image", "data": "QUJD", "mimeType": "image/png"}]
            send(id=id, result={"content": content, "structuredContent": {"ä": 1}})
        case "fail":
            send(id=id, result={**result("r" * 1000), "isError": True})
        case "refuse":
            send(id=id, error={"code": -32000, "message": "no such luck"})
        case "rubbish":
            sys.stdout.write("Hello!\n{}\n[1\n\n")
            sys.stdout.flush()
            send(id=id, result=result("after rubbish"))
        case "flood":
            while True:
                sys.stdout.write("rubbish " * 100 + "\n")
        case "long line":
            while True:
                sys.stdout.write("x" * 65536)
        case "close":
            os.close(1)
            time.sleep(3600)
        case "stderr flood":
            while True:
                sys.stderr.write("noise " * 100 + "\n")
        case "shrink" | "flaky" | "once":
            sys.exit("odd")
        case _:
            pass  # no answer


def call(id: int, name: str, arguments: dict[str, Any]) -> None:
    if name == "odd":
        misbehave(id)
    else:
        send(id=id, result=result(json.dumps(arguments.get("value"))))


if behaviour == "shrink":  # it has one tool less from the second start on
    started = Path(sys.argv[2], "started")
    if started.exists():
        tools.pop()
    started.touch()
if behaviour in ("flaky", "once"):  # starts 2 and 3 fail, or all but the first
    starts = Path(sys.argv[2], "starts")
    with starts.open("a") as file:
        print(time.monotonic(), file=file)
    count = len(starts.read_text().splitlines())
    if count > 1 and (behaviour == "once" or count < 4):
        sys.exit("not today")
if behaviour == "slow start":
    time.sleep(2)
if behaviour == "no start":
    Path(sys.argv[2], "starting").touch()
    time.sleep(3600)
if behaviour in ("name", "schema", "clash", "long name"):
    tools[1]["name"] = {"clash": "oth/er", "long name": "n" * 63}.get(behaviour, "odd")
    tools[2]["name"] = "oth.er"
    tools[2]["inputSchema"] = SCHEMA
    if behaviour == "schema":
        tools[2]["inputSchema"] = {"type": "object", "properties": {"value": {"type": "nonsense"}}}

for line in sys.stdin:
    request = json.loads(line)
    match request["method"]:
        case "initialize":
            info = {"name": "raw", "version": "1"}
            version = request["params"]["protocolVersion"]
            send(
                id=request["id"],
                result={"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info},
            )
        case "tools/list":
            page = int(request.get("params", {}).get("cursor", "0"))
            more = {"nextCursor": str(page + 1)} if page + 1 < len(tools) else {}
            send(id=request["id"], result={"tools": tools[page : page + 1], **more})
        case "tools/call":
            call(request["id"], request["params"]["name"], request["params"].get("arguments", {}))
        case method if "id" in request:
            send(id=request["id"], error={"code": -32601, "message": f"no {method}"})
