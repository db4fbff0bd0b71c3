"""Files of problems and results: wrong lines are reported by number, and a cut-off last line is ignored."""

from pathlib import Path

import pytest

from agents.workflow import Entry
from runtime.engines.usage import Usage
from runtime.errors import InputError
from runtime.jobs import problems
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import JobResult

LINES = [
    ('{"id": "a", "problem": "1+2", "answer": 3}', None),
    ('{"problem": "1+2"}', None),
    ("{", "line 3: not JSON"),
    ("[1]", "line 4: not an object"),
    ('{"id": "b"}', 'line 5: "problem" is missing'),
    ('{"id": "c", "problem": 5}', 'line 6: "problem" is not text'),
    ('{"id": [1], "problem": "1"}', 'line 7: "id"'),
    ('{"id": "d", "problem": "1", "answer": true}', 'line 8: "answer"'),
    ('{"id": "e", "problem": "1", "anwser": 1}', "line 9: unknown key 'anwser'"),
    ('{"id": "a", "problem": "2+2"}', "line 10: id 'a' was used in line 1"),
    ('{"id": "f", "problem": "1", "answer": null}', None),
    ("[" * 100_000, "line 12: not JSON"),
    ('{"id": "g", "problem": "1", "answer": ' + "9" * 5000 + "}", "line 13: not JSON"),
    ('{"id": "h", "problem": "\\ud800"}', "line 14: not text"),
    ('{"id": "line-3", "problem": "1"}', None),
    ('{"id": 17, "problem": "1"}', None),
    ('{"problem": "1"}', None),
    ('{"id": "i", "problem": "1", "answer": 1, "compare": "contains"}', None),
    ('{"id": "j", "problem": "1", "answer": 1, "compare": null}', None),
    (
        '{"id": "k", "problem": "1", "answer": 1, "compare": "same"}',
        "line 20: \"compare\" is 'same'; use exact, number,",
    ),
    ('{"id": "l", "problem": "1", "answer": 1, "compare": [1]}', 'line 21: "compare" is [1]; use exact, number,'),
    ('{"id": "m", "problem": "1", "compare": "exact"}', 'line 22: "compare" is exact, but there is no expected answer'),
    (
        '{"id": "n", "problem": "1", "answer": "(", "compare": "regex"}',
        'line 23: "compare" is regex, but not a pattern',
    ),
]


def test_lines_are_read_and_wrong_ones_reported_by_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(line for line, _ in LINES) + "\n\n")
    read = problems.read(path)
    assert len(read) == len(LINES)
    for problem, (line, fault) in zip(read, LINES, strict=True):
        assert (problem.fault is None) == (fault is None), line
        assert fault is None or fault in str(problem.fault)
    assert [(p.id, p.expected) for p in read if not p.fault] == [
        *(("a", "3"), ("2", None), ("f", None), ("line-3", None), ("17", None), ("line-17", None)),
        *(("i", "1"), ("j", "1")),
    ]
    assert {p.id: p.compare for p in read if p.compare} == {"i": Comparison.CONTAINS}
    assert len({p.id for p in read}) == len(read)


def test_a_comparison_for_the_file_applies_to_lines_that_name_none(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"problem": "a", "answer": "x"}\n{"problem": "b", "answer": "1", "compare": "number"}\n{"problem": "c"}\n'
        '{"problem": "d", "answer": ""}\n'
    )
    a, b, c, d = problems.read(path, Comparison.CONTAINS)
    assert (a.compare, b.compare, c.compare) == (Comparison.CONTAINS, Comparison.NUMBER, None)
    assert "line 4" in str(d.fault)
    assert "has no words" in str(d.fault)


def test_line_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xff\xfe\n{"problem": "1+2"}\n')
    bad, good = problems.read(path)
    assert "line 1: not" in str(bad.fault)
    assert good.fault is None


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_file_without_problems_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="no problems"):
        problems.read(path)
    with pytest.raises(InputError, match="No such file"):
        problems.read(tmp_path / "nowhere")


def test_results_are_read_without_a_cut_off_last_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = JobResult("a", "1+2", "3", True, 1, [Entry("solver", "1+2", "3")], {"solver": Usage(1, 2, 0.5)}, 1.5, "3")
    line = problems.line(result)
    path.write_text(f"{line}\n{line}\n{line[:20]}")
    assert list(problems.done(path)) == [result, result]
    path.write_bytes(f"{line}\n".encode() + '{"id": "b", "problem": "Über'.encode()[:-4])
    assert list(problems.done(path)) == [result]
    assert list(problems.done(tmp_path / "nowhere")) == []


def test_a_result_keeps_its_comparison(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    named = JobResult("a", "Where?", "In Paris.", expected="Paris", compare=Comparison.CONTAINS)
    by_default = JobResult("b", "1+2", "It is 3.", expected="3")
    path.write_text("".join(f"{problems.line(result)}\n" for result in (named, by_default)))
    assert list(problems.done(path)) == [named, by_default]
    assert [result.as_json()["correct"] for result in (named, by_default)] == [True, True]
    assert "compare" not in by_default.as_json()
    path.write_text(problems.line(named).replace("contains", "guess") + "\n\n")
    with pytest.raises(InputError, match="line 1: not a result"):
        list(problems.done(path))


@pytest.mark.parametrize("content", [b"{\n{}\n", b'{"id": 1}\n', b"1\n", b"[]\n", b"Dear Ann,", b"\xff\xd8"])
def test_file_of_something_else_is_refused_as_results(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="file of results"):
        list(problems.done(path))
