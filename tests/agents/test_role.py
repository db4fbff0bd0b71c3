"""JSON that models write."""

import pytest

from agents.role import NESTING_MAX, ReplyUnusable, read_json


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r'{"code": "print(\ud83d)"}', r"'\\ud83d' is half of a surrogate pair"),
        (r'{"a": ["\ude00\ud83d"]}', r"'\\ude00' is half of a surrogate pair"),
        (r'{"\ud83d": 1}', r"'\\ud83d' is half of a surrogate pair"),
        ("[1, NaN]", "a number is nan; it must be finite"),
        ("1e999", "a number is inf; it must be finite"),
        (nested(NESTING_MAX + 1), f"it is nested more than {NESTING_MAX} deep"),
        ('{"a":' * (NESTING_MAX + 1) + "1" + "}" * (NESTING_MAX + 1), f"it is nested more than {NESTING_MAX} deep"),
    ],
)
def test_value_that_cannot_be_written_again_is_unusable(text: str, why: str) -> None:
    with pytest.raises(ReplyUnusable, match=f"not JSON: {why}"):
        read_json(text)


def test_whole_surrogate_pairs_and_moderate_nesting_are_read() -> None:
    assert read_json(r'{"a": "\ud83d\ude00"}') == {"a": "\N{GRINNING FACE}"}
    assert read_json(nested(NESTING_MAX))
