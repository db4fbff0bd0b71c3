"""The file of results of `troupe solve --out`: one JSON object a line. A resumed run keeps the answers in it."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Self

from runtime.errors import InputError, TroupeError
from runtime.jobs import problems
from runtime.jobs.job import JobResult
from runtime.jobs.problems import Problem


def read_kept(path: Path, resume: bool, asked: Sequence[Problem]) -> dict[str, JobResult]:
    """Return the results that a run keeps, by id. There are none unless the run resumes.

    It keeps results with an answer, unless `asked` has another problem with the same id. Expected answers and
    comparisons are those of `asked`. Raises InputError if the file exists and the run does not resume, or if the file
    cannot be written to.
    """
    if path.exists() and not resume:
        raise InputError(f"--out: {path} already exists; give --resume to continue it, or another file")
    if not path.parent.is_dir():
        raise InputError(f"--out: the folder {path.parent} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise InputError(f"--out: {path} is not a regular file; give another path")
    by_id = {problem.id: problem for problem in asked}
    kept = {}
    for result in problems.done(path):
        problem = by_id.get(result.id)
        if result.error is not None or (problem is not None and problem.problem != result.problem):
            continue
        kept[result.id] = (
            result if problem is None else replace(result, expected=problem.expected, compare=problem.compare)
        )
    return kept


class ResultsFile:
    """A context manager over a file of results, open for appending. It starts with exactly the results that are kept.

    The kept results replace the file's content in one atomic rename, so an interruption loses none of them. Raises
    TroupeError if the file cannot be written.
    """

    def __init__(self, path: Path, kept: Sequence[JobResult]) -> None:
        target = path.resolve()
        try:
            if kept:
                _replace(target, kept)
            self._file: IO[str] = target.open("a" if kept else "w", encoding="utf-8")
        except OSError as error:
            raise TroupeError(f"--out: cannot write {path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, result: JobResult) -> None:
        """Append a result and flush it to the operating system. Raises TroupeError."""
        try:
            self._file.write(problems.line(result) + "\n")
            self._file.flush()
        except OSError as error:
            raise TroupeError(
                f"--out: {error.strerror}; the results written so far are kept, continue with --resume"
            ) from None


def _replace(target: Path, results: Sequence[JobResult]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(f"{problems.line(result)}\n" for result in results)
    temporary.chmod(target.stat().st_mode)
    temporary.replace(target)
