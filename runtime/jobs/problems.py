"""Files of problems and of results: one JSON object a line.

A line that is wrong is told with its number and costs no other line its result. Results are appended and flushed as
they come, so that an interrupted run keeps what is done; `done` reads them back, without a last line that was cut.
"""

import json
from collections.abc import Iterator
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
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem = _read_line(line, number, path)
        if problem.fault is None and problem.id in first_line:
            fault = f"{path}, line {number}: id {problem.id!r} was used in line {first_line[problem.id]}"
            problem = Problem(f"line-{number}", problem.problem, None, fault)
        first_line.setdefault(problem.id, number)
        problems.append(problem)
    if not problems:
        raise InputError(f'{path}: no problems; write a line such as {{"id": "1", "problem": "12+7"}}')
    return problems


def done(path: Path) -> Iterator[JobResult]:
    """The whole results in a file of results; none when there is no file. Raises InputError for another file."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            yield JobResult.from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):  # cut off as it was written
                return
            raise InputError(f"{path}, line {number}: not a result; is this a file of results?") from None


def line(result: JobResult) -> str:
    """A result as one line of JSON."""
    return json.dumps(result.as_json(), ensure_ascii=False)


def _read_line(raw: bytes, number: int, path: Path) -> Problem:
    try:
        data = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        return _faulty(path, number, f"not JSON ({reason})")
    if not isinstance(data, dict):
        return _faulty(path, number, 'not an object such as {"id": "1", "problem": "12+7"}')
    unknown = sorted(set(data) - {"id", "problem", "answer"})
    if unknown:
        return _faulty(path, number, f"unknown key {unknown[0]!r}; known are id, problem and answer")
    problem, identity, answer = data.get("problem"), data.get("id", number), data.get("answer")
    if not isinstance(problem, str):
        return _faulty(path, number, '"problem" is missing' if problem is None else '"problem" is not text')
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        return _faulty(path, number, '"id" is neither text nor a whole number')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        return _faulty(path, number, '"answer" is neither text nor a number')
    return Problem(str(identity), problem, None if answer is None else str(answer))


def _faulty(path: Path, number: int, why: str) -> Problem:
    return Problem(f"line-{number}", "", None, f"{path}, line {number}: {why}")
