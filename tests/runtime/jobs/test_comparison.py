"""Comparisons: which answers are right, and which expected answers cannot be compared in a way."""

from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.jobs import comparison
from runtime.jobs.comparison import Comparison, matches
from tests.runtime.jobs.test_quantity import DECIMALS, SENTENCES, written

EXACT, NUMBER, CONTAINS, REGEX = Comparison.EXACT, Comparison.NUMBER, Comparison.CONTAINS, Comparison.REGEX
CASES: list[tuple[Comparison | None, str, str, bool]] = [
    (None, "26905", "26,905", True),
    (None, "26905", "The answer is 26905.", True),
    (None, "26905", "26905 apples", True),
    (None, "26905", "26904", False),
    (None, "26905", "-26905", False),
    (None, "26905", "26.905", False),
    (None, "26905", "I do not know", False),
    (None, "-$1,000", "a loss of −1000.0", True),
    (None, "0.5", "50%", True),
    (None, "50", "50%", True),
    (None, "50%", "0.5", True),
    (None, "50%", "0.5%", False),
    (None, "1/3", "0.333", False),
    (None, "Paris", " paris. ", True),
    (None, "Paris", "It is Paris.", False),
    (None, "5 apples", "5", False),
    (EXACT, "26905", "26,905", False),
    (NUMBER, "5 apples", "There are 5.", True),
    (NUMBER, "48 + 24 = 72 clips.\n#### 72", "72", True),
    (NUMBER, "3,5", "3,5", True),
    (NUMBER, "1,2,3 and 4,5,6", "1,2,3 and 4,5,6", True),
    (NUMBER, "no number", "5", False),
    (NUMBER, "5", f"The answer is 7. {'.' * 10_000} 5", True),
    (CONTAINS, "New York", "It is NEW\n  york, I think", True),
    (CONTAINS, "New York.", "It is new york", True),
    (CONTAINS, "cat", "cats", False),
    (CONTAINS, "cat", "(cat)", True),
    (CONTAINS, "$5", "US $5.", True),
    (CONTAINS, "5", "15", False),
    (CONTAINS, "straße", "in der STRASSE", True),
    (CONTAINS, "", "anything", False),
    (REGEX, r"^\d+ (apples|pears)$", " 12 pears\n", True),
    (REGEX, r"^\d+$", "12 pears", False),
    (REGEX, "(", "(", False),
    (REGEX, "b$", "a" * 10_000 + "b", True),
]


@pytest.mark.parametrize(("how", "expected", "answer", "right"), CASES)
def test_an_answer_is_right_or_wrong(how: Comparison | None, expected: str, answer: str, right: bool) -> None:
    assert matches(answer, expected, how) is right


@pytest.mark.parametrize(
    ("expected", "how", "message"),
    [
        (None, EXACT, "no expected answer"),
        ("Paris", NUMBER, "has no number"),
        (" . ", CONTAINS, "has no words"),
        ("(", REGEX, "unclosed group"),
    ],
)
def test_an_expected_answer_that_cannot_be_compared_is_refused(
    expected: str | None, how: Comparison, message: str
) -> None:
    assert message in str(comparison.fault(expected, how))


def test_an_expected_answer_that_can_be_compared_is_accepted() -> None:
    for how in Comparison:
        assert comparison.fault("12", how) is None


@given(DECIMALS, DECIMALS, st.sampled_from(SENTENCES))
def test_a_number_equals_itself_and_no_other_however_it_is_written(
    value: Decimal, other: Decimal, sentence: str
) -> None:
    assume(value != other)
    answer = sentence.format(written(value, ","))
    assert matches(answer, str(value))
    assert not matches(answer, str(other))


@given(st.text(), st.text())
def test_an_exact_answer_is_right_by_the_default_too(expected: str, answer: str) -> None:
    assert matches(expected, expected)
    if matches(answer, expected, EXACT):
        assert matches(answer, expected)


@given(st.text(), st.text(min_size=1), st.text())
def test_words_are_found_between_other_words(before: str, expected: str, after: str) -> None:
    assume(comparison.fault(expected, CONTAINS) is None)
    assert matches(f"{before} {expected} {after}", expected, CONTAINS)
