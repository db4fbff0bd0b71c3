"""The process that runs a tool's function, one call at a time.

It reads the arguments of each call as a line of JSON from stdin, and writes an Answer as a line of JSON to stdout. The
function gets neither: its stdin is empty, and what it prints goes to stderr.
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
from runtime.tools.bounded_output import cut

MESSAGE_MAX_BYTES = 2000
"""The most of an exception's message that is reported."""

_ROOT = Path(__file__).resolve().parents[3]
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from runtime.tools.function import worker; worker.main(*sys.argv[2:])"
)


class Answer(Value):
    """The output of a call, or the message of its error if it failed."""

    text: str
    failed: bool


def answer_max_bytes(output_max_bytes: int) -> int:
    """Return the most that the line of an answer takes: JSON writes some characters in six bytes."""
    return 6 * (max(output_max_bytes, MESSAGE_MAX_BYTES) + 200)


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
        _send(responses, _failure(f"{target} cannot be loaded: {_line(error)}"))
        return
    _send(responses, Answer(text="", failed=False))
    pid = os.getpid()
    with asyncio.Runner() as runner:
        for line in requests:
            answer = function.answer(line, runner, int(output_max_bytes))
            if os.getpid() != pid:  # the function forked, and this is the copy
                os._exit(0)
            _send(responses, answer)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the runtime. Programs that the function starts do not inherit them."""
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, responses


class _CallFailed(Exception):
    """The call failed. The message says why."""


@dataclass(frozen=True)
class _Function:
    function: Callable[..., Any]
    form: type[BaseModel]

    @classmethod
    def loaded(cls, target: str) -> "_Function":
        function = pkgutil.resolve_name(target)
        return cls(function, form_of(function))

    def answer(self, line: bytes, runner: asyncio.Runner, output_max_bytes: int) -> Answer:
        """Run the function with the arguments in a line of JSON. Return its output or its error, cut to the bounds."""
        try:
            return Answer(text=cut(self._output(line, runner), output_max_bytes), failed=False)
        except _CallFailed as failed:
            return _failure(str(failed))

    def _output(self, line: bytes, runner: asyncio.Runner) -> str:
        try:
            form = self.form.model_validate_json(line)
        except ValidationError as error:
            raise _CallFailed(f"the arguments do not fit: {explain(error, 'the object')}") from None
        try:
            value = self.function(**{name: getattr(form, name) for name in self.form.model_fields})
            if inspect.isawaitable(value):
                value = runner.run(_awaited(value))
        except BaseException as error:  # noqa: BLE001  the model reads any exception, SystemExit too
            raise _CallFailed(_line(error)) from None
        try:
            return str(value) if isinstance(value, str) else to_json(value, inf_nan_mode="strings").decode()
        except (PydanticSerializationError, ValueError, RecursionError) as error:
            reason = f"it returned a {type(value).__name__}, which cannot be written as JSON: {_line(error)}"
            raise _CallFailed(reason) from None


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _line(error: BaseException) -> str:
    """Return the type and message of an exception in one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  a third party's __str__ may raise anything
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _failure(message: str) -> Answer:
    return Answer(text=cut(message, MESSAGE_MAX_BYTES), failed=True)


def _send(responses: BinaryIO, answer: Answer) -> None:
    responses.write(answer.model_dump_json().encode() + b"\n")
    responses.flush()
