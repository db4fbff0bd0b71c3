"""`troupe solve`: how the options and the file decide the comparison of a problem."""

from pathlib import Path

from click.testing import CliRunner

from runtime.cli.solve import Options, solve
from runtime.jobs.comparison import Comparison
from runtime.jobs.problems import Problem


def test_compare_needs_a_file() -> None:
    ended = CliRunner().invoke(solve, ["--compare", "exact", "1+1"])
    assert ended.exit_code == 2
    assert "--compare needs --file" in ended.output


def test_an_unknown_comparison_is_refused_with_the_known_ones() -> None:
    ended = CliRunner().invoke(solve, ["--file", "p.jsonl", "--compare", "same"])
    assert ended.exit_code == 2
    assert "'exact', 'number', 'contains', 'regex'" in ended.output


def test_an_answer_that_cannot_be_compared_is_a_fault_of_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1", "answer": "("}\n')
    ended = CliRunner().invoke(solve, ["--file", str(file), "--compare", "regex"])
    assert ended.exit_code == 1
    assert 'line 1: "compare" is regex, but not a pattern' in " ".join(ended.output.split())


def test_a_job_is_compared_as_its_problem_says() -> None:
    options = Options(None, False, 1, None, 0, False, False)
    assert options.job(Problem("1", "1+1", "2", compare=Comparison.REGEX)).compare is Comparison.REGEX
