"""Runs code as a REPL would: shows the value of a last expression, and the traceback of an exception."""

import ast
import linecache
import sys
import traceback
from contextlib import suppress
from types import CodeType, ModuleType

FILE = "<python>"
_RESERVE_BYTES = 2 << 20
"""Freed after an exception, so that its traceback can be written when the code has used up the memory."""


def run(source: str) -> int:
    """Run code as the main module, and return the exit status that it asks for.

    A traceback shows the code's own frames only. It is output, and leaves the exit status at 0.
    """
    reserve = bytearray(_RESERVE_BYTES)
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        statements, expression = _compiled(source)
        exec(statements, main.__dict__)
        if expression is not None:
            sys.displayhook(eval(expression, main.__dict__))
    except SystemExit as request:
        return _status(request)
    except BaseException as error:  # noqa: BLE001  the traceback of any exception is the result
        del reserve
        _show(error)
    return 0


def _compiled(source: str) -> tuple[CodeType, CodeType | None]:
    """Return the code, and apart from it the last expression, if the code ends in one."""
    tree = ast.parse(source, FILE)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    statements = compile(tree, FILE, "exec")
    if not isinstance(last, ast.Expr):
        return statements, None
    return statements, compile(ast.Expression(last.value), FILE, "eval")


def _status(request: SystemExit) -> int:
    if isinstance(request.code, int):
        return request.code & 0xFF
    if request.code is not None:
        _write(f"{request.code}\n")
    return int(request.code is not None)


def _show(error: BaseException) -> None:
    try:
        found = traceback.TracebackException.from_exception(error)
        _keep_own_frames(found)
        text = "".join(found.format())
    except MemoryError:
        text = f"{type(error).__name__}\n"
    _write(text)


def _keep_own_frames(found: traceback.TracebackException) -> None:
    pending, seen = [found], set()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.stack = traceback.StackSummary.from_list([frame for frame in each.stack if frame.filename == FILE])
        pending += [next_ for next_ in (each.__cause__, each.__context__, *(each.exceptions or ())) if next_]


def _write(text: str) -> None:
    """Write to standard error, after what was printed. The code may have closed either stream."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.write(text if stream is sys.stderr else "")
            stream.flush()
