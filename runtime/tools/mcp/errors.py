"""Turns the errors of the MCP client into messages for users and models."""

REASON_MAX_CHARS = 2000


def reason(error: BaseException) -> str:
    """Return what an error says, in one short line. Of a group, the first error counts."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:REASON_MAX_CHARS] or type(error).__name__
