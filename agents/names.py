"""Suggestions for error messages about unknown names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known names most similar to `name`, and all known names."""
    names = list(dict.fromkeys(known))
    similar = difflib.get_close_matches(name, names, n=2)
    question = f"did you mean {' or '.join(similar)}? " if similar else ""
    return question + f"known: {', '.join(names) or 'none'}"
