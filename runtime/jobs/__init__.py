"""Jobs: problems that a team works, from their acceptance to their result."""
