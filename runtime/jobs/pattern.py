"""Searches answers for regular expressions, in bounded time.

Patterns run on pydantic's engine, which is Rust's `regex`. It does not backtrack, so its time grows linearly with the
text, whatever the pattern is. Python's `re` has neither this property nor a timeout, and would stop the service on a
pattern such as `(a+)+$`. The price is that look-around and backreferences do not exist.

The time also grows with the size of the pattern once its counted repetitions are written out, so that size is bounded.
The slowest pattern that we found within the bounds takes 0.2 s for an answer of 10,000 characters, on one core.
"""

import math
import re
from functools import lru_cache
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

PATTERN_MAX_CHARACTERS = 1000
EXPANDED_MAX_CHARACTERS = 10_000
"""Longest pattern after its counted repetitions are written out: `(ab){3}` becomes `(ab)(ab)(ab)`."""

_COUNT = re.compile(r"(?P<repeated>.?)\{\s*(?P<least>\d+)\s*(?:,\s*(?P<most>\d*)\s*)?\}", re.DOTALL)


@lru_cache(maxsize=4096)  # each view of a job checks its fields again
def fault(pattern: str) -> str | None:
    """Return what is wrong with a pattern, and what would be right, or None."""
    if not pattern:
        return "the pattern is empty; write what the answer must hold"
    if len(pattern) > PATTERN_MAX_CHARACTERS:
        return f"the pattern has {len(pattern)} characters; use at most {PATTERN_MAX_CHARACTERS}"
    if _expanded(pattern) > EXPANDED_MAX_CHARACTERS:
        return "the pattern repeats too much; use smaller counts in {...}"
    try:
        _compile(pattern)
    except SchemaError as error:
        return f"not a pattern of Rust's regex syntax: {_reason(error)}"
    return None


def found(pattern: str, text: str) -> bool:
    """Return True if a pattern is found anywhere in a text. A pattern with a fault is not found."""
    if fault(pattern):
        return False
    try:
        _compile(pattern).validate_python(text)
    except ValidationError:
        return False
    return True


@lru_cache(maxsize=16)  # a compiled pattern can have 10 MB
def _compile(pattern: str) -> TypeAdapter[str]:
    """Compile a pattern. Raises SchemaError if it is none."""
    return TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])


def _expanded(pattern: str) -> int:
    """Return an upper bound for the length of a pattern whose counted repetitions are written out.

    Groups can be nested, so their counts multiply. Counts of a single character or class cannot.
    """
    counts = [(count["repeated"], int((count["most"] or count["least"])[:9])) for count in _COUNT.finditer(pattern)]
    single = max((count for repeated, count in counts if _is_single(repeated)), default=1)
    groups = math.prod(max(count, 1) for repeated, count in counts if not _is_single(repeated))
    return len(pattern) * max(single, 1) * groups


def _is_single(repeated: str) -> bool:
    return repeated.isalnum() or repeated in ("]", ".")


def _reason(error: SchemaError) -> str:
    """Return the last line of an error of the engine, which says what is wrong in words."""
    return str(error).splitlines()[-1].strip().removeprefix("error: ").removeprefix("SchemaError: ")
