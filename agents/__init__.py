"""What a role says: tasks, replies, roles and workflows. No I/O, no engine; testable alone."""
