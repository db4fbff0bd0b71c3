"""The tools of MCP servers, over the official client.

A call's way:

1. `McpServer` hands the call to its connection. It first opens a new one if the last one is lost or does not answer.
2. The connection runs the call in a task of its own, so that a caller can leave at any time.
3. The client sends the call over the transport: a process's standard streams, or HTTP.
4. The answer becomes text, and is cut at `output_max_bytes`.

Nothing is sent twice: a call that was under way when the connection was lost fails, because the server may have carried
it out. A server's hints that a tool only reads or is idempotent are not used. MCP calls them untrusted, and a wrong
hint would repeat a side effect after a crash.

Only `settings` can be imported without the package `mcp`, which takes half a second.
"""
