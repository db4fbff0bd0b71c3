"""Names in errors: what a wrong one was perhaps meant to be."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """For the end of an error: the names that are meant perhaps, and all that there are."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=2)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known: {', '.join(names) or 'none'}"
