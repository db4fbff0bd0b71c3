"""Files of problems and of results: one JSON object a line.

A line that is wrong is told with its number and costs no other line its result. Results are appended and flushed as
they come, so that an interrupted run keeps what is done; `done` reads them back, without a last line that was cut.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError
from runtime.jobs.job import JobResult


@dataclass(frozen=True)
class Problem:
    """One line of a file of problems. `fault` says what is wrong with it, in which case it is not to be run."""

    id: str
    problem: str
    expected: str | None = None
    fault: str | None = None


def read(path: Path) -> list[Problem]:
    """Every line of the file as a problem, faulty ones too. Raises InputError when there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    read = [_read_line(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]
    if not read:
        raise InputError(f'{path}: no problems; write a line such as {{"id": "1", "problem": "12+7"}}')
    given: dict[str, int] = {}
    for line in read:
        if line.id in given:
            line.fault = f"{path}, line {line.number}: id {line.id!r} was used in line {given[line.id]}"
            line.id = ""
        elif line.id:
            given[line.id] = line.number
    return [Problem(line.id or _free_id(line, given), line.problem, line.expected, line.fault) for line in read]


def done(path: Path) -> Iterator[JobResult]:
    """The whole results in a file of results; none when there is no file. Raises InputError for another file."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}; is this a file of results?") from None
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            yield JobResult.from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number == len(lines):  # cut off as it was written
                return
            raise InputError(f"{path}, line {number}: not a result; is this a file of results?") from None


def line(result: JobResult) -> str:
    """A result as one line of JSON."""
    return json.dumps(result.as_json(), ensure_ascii=False)


@dataclass
class _Line:
    """A line as it was read; an empty `id` is none."""

    number: int
    id: str = ""
    problem: str = ""
    expected: str | None = None
    fault: str | None = None


def _free_id(line: _Line, given: Mapping[str, int]) -> str:
    """For a line without an id: its number, written so that it is no other line's id."""
    name = f"line-{line.number}" if line.fault else str(line.number)
    while name in given:
        name = f"line-{name}"
    return name


def _read_line(raw: bytes, number: int, path: Path) -> _Line:
    fault = f"{path}, line {number}: "
    try:
        data = json.loads(raw)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeError:
        return _Line(number, fault=fault + "not text (UTF-8)")
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return _Line(number, fault=f"{fault}not JSON ({reason})")
    if not isinstance(data, dict):
        return _Line(number, fault=fault + 'not an object such as {"id": "1", "problem": "12+7"}')
    unknown = sorted(set(data) - {"id", "problem", "answer"})
    problem, identity, answer = data.get("problem"), data.get("id"), data.get("answer")
    if unknown:
        fault += f"unknown key {unknown[0]!r}; known are id, problem and answer"
    elif not isinstance(problem, str):
        fault += '"problem" is missing' if problem is None else '"problem" is not text'
    elif isinstance(identity, bool) or not isinstance(identity, str | int | None):
        fault += '"id" is neither text nor a whole number'
    elif isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        fault += '"answer" is neither text nor a number'
    else:
        return _Line(
            number, "" if identity is None else str(identity), problem, None if answer is None else str(answer)
        )
    return _Line(number, fault=fault)
