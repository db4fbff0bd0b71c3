"""Reads files of problems, and reads and writes files of results: one JSON object a line.

A wrong line is reported by its number and does not keep the others from being run. Results are written one by one, so
an interrupted run keeps what it has; `done` reads them back, and ignores a last line that was cut off.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError
from runtime.jobs import comparison
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import JobResult


@dataclass(frozen=True)
class Problem:
    """One line of a file of problems. A problem with a `fault`, which says what is wrong, must not be run."""

    id: str
    problem: str
    expected: str | None = None
    fault: str | None = None
    compare: Comparison | None = None


def read(path: Path, compare: Comparison | None = None) -> list[Problem]:
    """Read every line of a file of problems, including wrong ones.

    `compare` is the comparison of lines that have an answer and name no comparison.
    Raises InputError if the file cannot be read or has no problems.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    parsed = [_read_line(line, number, path, compare) for number, line in enumerate(lines, start=1) if line.strip()]
    if not parsed:
        raise InputError(f'{path}: no problems; write a line such as {{"id": "1", "problem": "12+7"}}')
    line_of_id: dict[str, int] = {}
    for line in parsed:
        if line.id in line_of_id:
            line.fault = f"{path}, line {line.number}: id {line.id!r} was used in line {line_of_id[line.id]}"
            line.id = ""
        elif line.id:
            line_of_id[line.id] = line.number
    return [
        Problem(line.id or _free_id(line, line_of_id), line.problem, line.expected, line.fault, line.compare)
        for line in parsed
    ]


def done(path: Path) -> Iterator[JobResult]:
    """Yield the results in a file of results; none if there is no file.

    Raises InputError if it is not a file of results.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is this a file of results?") from None
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            yield JobResult.from_json(json.loads(text.decode()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number == len(lines) and text.startswith(b"{"):  # a run was interrupted while it wrote this line
                return
            raise InputError(f"{path}, line {number}: not a result; is this a file of results?") from None


def line(result: JobResult) -> str:
    """Return a result as one line of JSON."""
    return json.dumps(result.as_json(), ensure_ascii=False)


@dataclass
class _Line:
    """A parsed line. `id` is empty if the line has none."""

    number: int
    id: str = ""
    problem: str = ""
    expected: str | None = None
    fault: str | None = None
    compare: Comparison | None = None


def _free_id(line: _Line, used: Mapping[str, int]) -> str:
    """Return an id for a line without one: its number, prefixed until no other line has that id."""
    name = f"line-{line.number}" if line.fault else str(line.number)
    while name in used:
        name = f"line-{name}"
    return name


def expectation(
    answer: object, compare: object, default: Comparison | None = None
) -> tuple[str | None, Comparison | None]:
    """Return the expected answer and the comparison that the values of "answer" and "compare" mean in a line.

    `default` is the comparison of lines that have an answer and name no comparison. Raises InputError that names the
    key and what would be right.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise InputError('"answer" is neither text nor a number')
    expected = None if answer is None else str(answer)
    if compare is None and (default is None or expected is None):
        return expected, None
    try:
        chosen = default if compare is None else Comparison(str(compare))
    except ValueError:
        raise InputError(f'"compare" is {compare!r}; use {", ".join(Comparison)}') from None
    if chosen and (fault := comparison.fault(expected, chosen)):
        raise InputError(f'"compare" is {chosen}, but {fault}')
    return expected, chosen


def _read_line(raw: bytes, number: int, path: Path, compare: Comparison | None) -> _Line:
    place = f"{path}, line {number}"
    try:
        data = json.loads(raw)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeError:
        return _Line(number, fault=f"{place}: not text in UTF-8")
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return _Line(number, fault=f"{place}: not JSON ({reason})")
    if not isinstance(data, dict):
        return _Line(number, fault=f'{place}: not an object such as {{"id": "1", "problem": "12+7"}}')
    if fault := _fault(data):
        return _Line(number, fault=f"{place}: {fault}")
    try:
        expected, chosen = expectation(data.get("answer"), data.get("compare"), compare)
    except InputError as error:
        return _Line(number, fault=f"{place}: {error}")
    id = data.get("id")
    return _Line(number, "" if id is None else str(id), data["problem"], expected, compare=chosen)


def _fault(data: Mapping[str, object]) -> str | None:
    """Return what is wrong with the keys or values of a line, or None."""
    unknown = sorted(set(data) - {"id", "problem", "answer", "compare"})
    problem, id = data.get("problem"), data.get("id")
    if unknown:
        return f"unknown key {unknown[0]!r}; known keys are id, problem, answer and compare"
    if problem is None:
        return '"problem" is missing'
    if not isinstance(problem, str):
        return '"problem" is not text'
    if isinstance(id, bool) or not isinstance(id, str | int | None):
        return '"id" is neither text nor a whole number'
    return None
