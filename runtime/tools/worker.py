"""The process that runs a tool's function, one call at a time.

It reads the arguments of each call as a line of JSON from stdin, and writes an Answer to stdout. The function gets
neither: its stdin is empty, and what it prints goes to stderr.
"""

import asyncio
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from agents.role import Value, explain
from agents.tool import form_of

MESSAGE_MAX_BYTES = 2000
"""The most of an exception's message that is reported."""

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from runtime.tools import worker; worker.main(*sys.argv[2:])"
)


class Header(Value):
    """The line of JSON before the text of an answer: whether the call failed, and the size of the text.

    `cut_bytes` counts what was cut from the end of the text.
    """

    failed: bool
    text_bytes: int
    cut_bytes: int = 0


def command(target: str, output_max_bytes: int) -> list[str]:
    """Return the command that runs a function, "module:function", with the modules that this process can import."""
    path = [os.path.abspath(entry) for entry in (*sys.path, str(_ROOT))]  # noqa: PTH100  "" is the current folder
    return [sys.executable, "-c", _BOOT, json.dumps(path), target, str(output_max_bytes)]


def main(target: str, output_max_bytes: str) -> None:
    """Load the function and say whether that worked; then answer calls until stdin closes."""
    requests, responses = _take_pipes()
    try:
        function = _Function.loaded(target)
    except BaseException as error:  # noqa: BLE001  importing a third party's module may raise anything
        _send(responses, f"{target} cannot be loaded: {_line(error)}", True, MESSAGE_MAX_BYTES)
        return
    _send(responses, "", False, 0)
    pid = os.getpid()
    with asyncio.Runner() as runner:
        for line in requests:
            text, failed = function.answer(line, runner)
            if os.getpid() != pid:  # the function forked, and this is the copy
                os._exit(0)
            _send(responses, text, failed, MESSAGE_MAX_BYTES if failed else int(output_max_bytes))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the runtime. Programs that the function starts do not inherit them."""
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, responses


@dataclass(frozen=True)
class _Function:
    function: Callable[..., Any]
    form: type[BaseModel]

    @classmethod
    def loaded(cls, target: str) -> "_Function":
        function = pkgutil.resolve_name(target)
        return cls(function, form_of(function))

    def answer(self, line: bytes, runner: asyncio.Runner) -> tuple[str, bool]:
        """Run the function with the arguments in a line of JSON. Return its output or its error, and if it failed."""
        try:
            form = self.form.model_validate_json(line)
        except ValidationError as error:
            return f"the arguments do not fit: {explain(error)}", True
        try:
            value = self.function(**{name: getattr(form, name) for name in self.form.model_fields})
            if inspect.isawaitable(value):
                value = runner.run(_awaited(value))
        except BaseException as error:  # noqa: BLE001  the model reads any exception, SystemExit too
            return _line(error), True
        try:
            return (str(value) if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()), False
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            return f"it returned a {type(value).__name__}, which cannot be written as JSON: {_line(error)}", True


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _line(error: BaseException) -> str:
    """Return the type and message of an exception in one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  a third party's __str__ may raise anything
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _send(responses: BinaryIO, text: str, failed: bool, max_bytes: int) -> None:
    """Write an answer, cut to the bound between two characters."""
    whole = text.encode(errors="replace")
    kept = whole[:max_bytes].decode(errors="ignore").encode()
    header = Header(failed=failed, text_bytes=len(kept), cut_bytes=len(whole) - len(kept))
    responses.write(header.model_dump_json().encode() + b"\n" + kept)
    responses.flush()
