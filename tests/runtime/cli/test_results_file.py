"""Files of results: which results a resumed run keeps, and how the file is written."""

from pathlib import Path

import pytest

from runtime.cli.results_file import ResultsFile, read_kept
from runtime.errors import InputError
from runtime.jobs import problems
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import JobResult
from runtime.jobs.problems import Problem

ANSWERED = JobResult("a", "1+1", "2")
FAILED = JobResult("b", "2+2", None, error="no engine")


def write(path: Path, *results: JobResult) -> None:
    path.write_text("".join(f"{problems.line(result)}\n" for result in results))


def test_a_resumed_run_keeps_answers_and_drops_failures(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, ANSWERED, FAILED)
    asked = [Problem("a", "1+1", "2"), Problem("b", "2+2", "4")]
    kept = read_kept(out, resume=True, asked=asked)
    assert list(kept) == ["a"]
    assert kept["a"].correct


def test_a_kept_answer_is_compared_as_the_problem_says_now(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, JobResult("a", "1+1", "It is 2.", expected="2", compare=Comparison.EXACT))
    kept = read_kept(out, resume=True, asked=[Problem("a", "1+1", "2", compare=Comparison.CONTAINS)])
    assert (kept["a"].correct, kept["a"].compare) == (True, Comparison.CONTAINS)


def test_an_answer_to_another_problem_with_the_same_id_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, ANSWERED)
    assert read_kept(out, resume=True, asked=[Problem("a", "1+2")]) == {}


def test_an_answer_to_a_problem_that_is_not_asked_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, ANSWERED)
    assert list(read_kept(out, resume=True, asked=[Problem("c", "1+2")])) == ["a"]


def test_an_existing_file_is_refused_without_resume(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, ANSWERED)
    with pytest.raises(InputError, match="already exists; give --resume"):
        read_kept(out, resume=False, asked=[])


def test_a_missing_folder_and_a_folder_as_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_kept(tmp_path / "nowhere" / "r.jsonl", resume=False, asked=[])
    with pytest.raises(InputError, match="not a regular file"):
        read_kept(tmp_path, resume=True, asked=[])


def test_the_file_starts_with_the_kept_results_and_grows(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write(out, ANSWERED, FAILED)
    with ResultsFile(out, [ANSWERED]) as file:
        file.write(FAILED)
    assert [result.id for result in problems.done(out)] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
