"""Tools that models call while they work on a task: functions in processes of their own, a sandbox, MCP servers."""
