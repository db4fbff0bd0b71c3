"""The command `troupe`: one module a command, `main` puts them together."""
