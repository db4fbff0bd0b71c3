"""Patterns: what is refused with a reason, and that no pattern takes long."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.jobs import pattern


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "empty"),
        ("(", "unclosed group"),
        ("[z-a]", "invalid character class range"),
        ("(?=a)", "look-around"),
        (r"(a)\1", "backreferences are not supported"),
        ("a" * 1001, "has 1001 characters; use at most 1000"),
        ("(a?b?){5000}", "repeats too much"),
        ("((a?){20}b?){900}", "repeats too much"),
        ("[ab]{30000}", "repeats too much"),
        ("a{99999999999999}", "repeats too much"),
        (r"(?:\w?){500}", "exceeds size limit"),
    ],
)
def test_a_wrong_pattern_is_refused_with_the_reason_and_never_found(wrong: str, message: str) -> None:
    assert message in str(pattern.fault(wrong))
    assert not pattern.found(wrong, wrong)


@pytest.mark.parametrize("right", [r"^\d{4}-\d{2}-\d{2}$", ".{1000}", r"(\d{4} ){5}", "(?x) a { 5 }", r"\{5\}", "é+"])
def test_an_ordinary_pattern_is_accepted(right: str) -> None:
    assert pattern.fault(right) is None


def test_a_pattern_is_found_anywhere_unless_it_has_anchors() -> None:
    assert pattern.found("b+", "abbc")
    assert not pattern.found("^b+", "abbc")
    assert not pattern.found("B", "abbc")
    assert pattern.found("(?i)B", "abbc")
    assert not pattern.found("b", "b\ud800")


@pytest.mark.parametrize(
    "slow", ["(a+)+$", "(a|b|ab)*[cd]", "(a?b?){600}[cd]", "[ab]*a[ab]{400}[cd]", "(a?b?c?){500}[de]"]
)
def test_a_catastrophic_pattern_takes_little_time(slow: str) -> None:
    """A backtracking engine would not end, so a generous limit, in seconds of CPU time, suffices."""
    assert pattern.fault(slow) is None
    started_s = time.process_time()
    assert not pattern.found(slow, "ab" * 5000 + "!")
    assert time.process_time() - started_s < 10


@given(st.text(max_size=50))
def test_any_text_is_a_pattern_or_has_a_reason(text: str) -> None:
    assert pattern.fault(text) != ""
    pattern.found(text, text)
