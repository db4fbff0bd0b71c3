"""Submissions: the comparison is checked where a job is submitted, and reaches the job and the result."""

import json

import pytest

from runtime.errors import InputError
from runtime.jobs.comparison import Comparison
from runtime.jobs.submission import Submission


def test_the_comparison_reaches_the_job() -> None:
    submission = Submission.read({"problem": "Where?", "expected": "Paris", "compare": "contains"})
    assert submission.job("j").compare is Comparison.CONTAINS
    assert Submission(problem="1+1", expected="2").job("j").compare is None


def test_a_submission_that_was_stored_without_a_comparison_is_read() -> None:
    stored = json.loads(Submission(problem="1+1", expected="2").model_dump_json())
    del stored["compare"]
    assert Submission.model_validate_json(json.dumps(stored)) == Submission(problem="1+1", expected="2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expected": "2", "compare": "same"}, "compare: input should be 'exact', 'number', 'contains' or 'regex'"),
        ({"compare": "exact"}, "compare: there is no expected answer to compare with"),
        ({"expected": "{fault}", "compare": "number"}, "compare: the expected answer has no number"),
        ({"expected": "[", "compare": "regex"}, "compare: not a pattern of Rust's regex syntax: unclosed character"),
        (
            {"expected": "a{99999}", "compare": "regex"},
            "compare: the pattern repeats too much; use smaller counts in {",
        ),
        ({"expected": 2, "compare": "number"}, "expected: input should be a valid string"),
    ],
)
def test_a_wrong_comparison_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        Submission.read({"problem": "1+1", **fields})
    assert str(refused.value).startswith(message)
