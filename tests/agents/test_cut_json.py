"""Texts that were cut off: what the model wrote is kept, and nothing is invented."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.cut_json import closed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"steps": ["add", "mul', {"steps": ["add"]}),
        ('{"work": "12+7=19", "res', {"work": "12+7=19"}),
        ('{"work": "12+7=19", "result":', {"work": "12+7=19"}),
        ('{"work": "a", "result": "269', {"work": "a"}),
        ('{"work": "a\\', {}),
        ('{"steps": ["a\n\tb", "c', {"steps": ["a\n\tb"]}),
        ('{"order": [2, 13', {"order": [2]}),
        ('{"value": -1.5e', {}),
        ('{"accepted": tr', {}),
        ('{"accepted": true', {}),
        ('{"accepted": true,', {"accepted": True}),
        ('{"reply": {"answer": "9', {"reply": {}}),
    ],
)
def test_value_in_which_the_text_ends_is_left_out(text: str, whole: object) -> None:
    assert json.loads(closed(text)) == whole


@pytest.mark.parametrize("text", ["", "no JSON", "}{", '{"a": 1}', "[1, 2]"])
def test_whole_and_foreign_texts_are_unchanged(text: str) -> None:
    assert closed(text) == text


@given(value=st.dictionaries(st.text(max_size=4), JSON, max_size=3), share=st.floats(0, 1))
def test_beginning_of_an_object_closes_to_an_object(value: dict[str, object], share: float) -> None:
    text = json.dumps(value)
    cut = text[: max(1, int(share * len(text)))]
    whole = json.loads(closed(cut))
    assert isinstance(whole, dict)
    assert is_beginning(whole, value)


def is_beginning(part: object, whole: object) -> bool:
    """Return True if `part` has nothing that `whole` does not have in the same place, up to where it was cut."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and is_beginning(value, whole[name]) for name, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(is_beginning, part, whole))
    return part == whole
