"""Compares an answer with the expected answer. README.md has a table of the comparisons."""

import re
import unicodedata
from enum import StrEnum

from runtime.jobs import pattern, quantity

ANSWER_MAX_CHARACTERS = 10_000
"""NUMBER and REGEX search only this many characters at the end of an answer, to bound the time."""


class Comparison(StrEnum):
    """The way to compare an answer with the expected answer.

    - EXACT: the texts are equal, except for surrounding blanks, case, and a final full stop.
    - NUMBER: the numbers are exactly equal, whatever their notation, or the texts are EXACT.
    - CONTAINS: the answer contains the expected words, except for case and the width of blanks.
    - REGEX: the expected answer is a pattern that occurs in the answer.
    - JUDGE: a seat of the team decides that the answer means the same as the expected answer.
    """

    EXACT = "exact"
    NUMBER = "number"
    CONTAINS = "contains"
    REGEX = "regex"
    JUDGE = "judge"


def default(expected: str) -> Comparison:
    """Return the comparison of a problem that names no comparison: NUMBER if a number is expected, otherwise EXACT."""
    return Comparison.NUMBER if quantity.whole(expected) else Comparison.EXACT


def fault(expected: str | None, comparison: Comparison) -> str | None:
    """Return why a comparison cannot use an expected answer, and what would be right, or None."""
    if expected is None:
        return "there is no expected answer to compare with; give one, or leave the comparison out"
    match comparison:
        case Comparison.EXACT | Comparison.JUDGE:
            return None
        case Comparison.NUMBER:
            is_number = quantity.final(expected) is not None
            return None if is_number else "the expected answer has no number; give one, or compare in another way"
        case Comparison.CONTAINS:
            return None if _words(expected) else "the expected answer has no words; give some"
        case Comparison.REGEX:
            return pattern.fault(expected)


def matches(answer: str, expected: str, comparison: Comparison | None = None) -> bool:
    """Return True if an answer matches the expected answer. If `comparison` is None, use the `default`.

    No answer matches an expected answer that has a `fault`. Raise ValueError for JUDGE, which needs the team.
    """
    match comparison or default(expected):
        case Comparison.EXACT:
            return _same_text(answer, expected)
        case Comparison.NUMBER:
            return _same_text(answer, expected) or _same_number(answer, expected)
        case Comparison.CONTAINS:
            words = _words(expected)
            return bool(words) and f"\0{words}\0" in f"\0{_words(answer)}\0"
        case Comparison.JUDGE:
            raise ValueError("a judge's comparison is part of the job")
        case Comparison.REGEX:
            return pattern.found(expected, answer.strip()[-ANSWER_MAX_CHARACTERS:])


def _same_text(answer: str, expected: str) -> bool:
    return answer.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold()


def _same_number(answer: str, expected: str) -> bool:
    wanted = quantity.whole(expected) or quantity.final(expected)
    given = quantity.final(answer[-ANSWER_MAX_CHARACTERS:])
    return wanted is not None and given is not None and given.equals(wanted)


def _words(text: str) -> str:
    r"""Return the words and signs of a text, separated by \0. Ignore case, blanks and a final full stop."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip().rstrip(".")
    return "\0".join(re.findall(r"\w+|[^\w\s\0]", folded))
