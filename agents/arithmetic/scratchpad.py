"""The notation of the embedded models: how a step is put to them and how it is worked, digit by digit.

Every number is a sign and five digits, so that each digit has a fixed place in the prompt and in the reply. Tokens
are separated by blanks in prompts; the tokenizer joins what a model writes without them. The writing half makes
the training data, the reading half serves the roles.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agents.arithmetic.expressions import APPLY, DIGITS, STEP_NAMES, Operation

RIGHT, WRONG = "right", "wrong"
AT_ONCE = "?"
_INVERSE = {"+": "-", "-": "+"}
_MATCH, _DIFFER = ".", "!"


def step_prompt(left: int, sign: str, right: int) -> str:
    """A step for the solver: "+ 0 0 0 1 2 * + 0 0 0 0 7"."""
    left, right = _smaller_factor_second(left, sign, right)
    return " ".join((*_number(left), sign, *_number(right)))


def claim_prompt(left: int, sign: str, right: int, result: int) -> str:
    """A step and its claimed result for the critic: the solver's prompt, "=", and the result."""
    return " ".join((step_prompt(left, sign, right), "=", *_number(result)))


def at_once_prompt(problem: str) -> str:
    """A whole problem for the solver, to be answered without steps."""
    return f"{AT_ONCE} {problem}"


def plan_reply(operations: Iterable[Operation]) -> list[str]:
    """The planner's reply, four tokens a step: A= 12 + 7 ;B= A * 3"""
    return [
        token
        for index, o in enumerate(operations)
        for token in (f"{';' if index else ''}{o.name}=", o.left, o.sign, o.right)
    ]


def result_reply(value: int) -> list[str]:
    return ["=", *_number(value)]


def worked_step(left: int, sign: str, right: int) -> list[str]:
    """The solver's reply: columns from the units up, then "=" and the result."""
    left, right = _smaller_factor_second(left, sign, right)
    columns = _multiply(left, right) if sign == "*" else _sum(left, sign, right).tokens
    return [*columns, *result_reply(APPLY[sign](left, right))]


def worked_check(left: int, sign: str, right: int, result: int) -> list[str]:
    """The critic's reply: the inverse operation, marks against the first operand, and the verdict."""
    left, right = _smaller_factor_second(left, sign, right)
    if sign == "*":
        return _check_by_division(left, right, result)
    inverse = _sum(result, _INVERSE[sign], right)
    marks = [_mark(inverse.sign == _sign(left))]
    marks += [_mark(a == b) for a, b in zip(inverse.digits, _digits(left), strict=True)]
    marks.append(_mark(inverse.carry == 0))
    return [*inverse.tokens, inverse.sign, *marks, RIGHT if _DIFFER not in marks else WRONG]


def read_plan(text: str) -> list[Operation]:
    """Read the planner's reply. Raises ValueError when it is not a list of named steps."""
    steps: list[Operation] = []
    for line in text.split(";"):
        match = re.fullmatch(r"([A-F])=(\d+|[A-F])([-+*])(\d+|[A-F])", line)
        if not match:
            raise ValueError(f"not a step: {line!r}")
        step = Operation(*match.groups())
        known = [earlier.name for earlier in steps]
        if step.name != STEP_NAMES[len(steps)] or any(o.isalpha() and o not in known for o in (step.left, step.right)):
            raise ValueError(f"step {line!r} is out of order")
        steps.append(step)
    return steps


def read_result(text: str) -> int:
    """The number after the last "=" of a solver's reply. Raises ValueError when there is none."""
    match = re.fullmatch(rf"(?s:.*)=([-+])(\d{{{DIGITS}}})", text)
    if not match:
        raise ValueError(f"no result in the reply {text[-40:]!r}")
    return int(match[1] + match[2])


def read_verdict(text: str) -> bool:
    """The critic's last word. Raises ValueError when it is neither "right" nor "wrong"."""
    for word, verdict in ((RIGHT, True), (WRONG, False)):
        if text.endswith(word):
            return verdict
    raise ValueError(f"no verdict in the reply {text[-40:]!r}")


def _smaller_factor_second(left: int, sign: str, right: int) -> tuple[int, int]:
    return (right, left) if sign == "*" and abs(left) < abs(right) else (left, right)


def _sign(value: int) -> str:
    return "-" if value < 0 else "+"


def _digits(value: int) -> tuple[int, ...]:
    """Five digits, most significant first. A number beyond five digits is the caller's defect."""
    assert abs(value) < 10**DIGITS, value
    return tuple(int(d) for d in f"{abs(value):0{DIGITS}d}")


def _number(value: int) -> list[str]:
    return [_sign(value), *map(str, _digits(value))]


def _mark(same: bool) -> str:
    return _MATCH if same else _DIFFER


@dataclass(frozen=True)
class _Sum:
    """A signed sum or difference worked in columns: `digits` most significant first, `carry` out of the last."""

    tokens: list[str]
    sign: str
    digits: Sequence[int]
    carry: int


def _sum(left: int, sign: str, right: int) -> _Sum:
    """Compare magnitudes from the top, say whether they add or subtract, then work the columns from the units up.

    A column is the two digits and their total; of a difference, the digit left and 10 for a borrow.
    """
    upper, lower = _digits(left), _digits(right)
    right_sign = _sign(right) if sign == "+" else _flip(_sign(right))
    states, state = [], "="
    for a, b in zip(upper, lower, strict=True):
        if state == "=" and a != b:
            state = "<" if a < b else ">"
        states.append(state)
    adds = _sign(left) == right_sign
    if state == "<":
        upper, lower = lower, upper
    columns, result, carry = [], [], 0
    for a, b in zip(reversed(upper), reversed(lower), strict=True):
        total = a + b + carry if adds else (a - b - carry) % 10 + 10 * (a < b + carry)
        columns += [str(a), str(b), str(total)]
        carry, digit = divmod(total, 10)
        result.append(digit)
    if adds or state == ">":
        result_sign = _sign(left)
    else:
        result_sign = right_sign if state == "<" else "+"
    return _Sum([*states, "+" if adds else "-", *columns], result_sign, result[::-1], carry)


def _flip(sign: str) -> str:
    return "+" if sign == "-" else "-"


def _multiply(left: int, right: int) -> list[str]:
    """Times the units digit, times the tens digit, then both partial products added, in columns from the units up.

    A column is the two digits and their product with the carry, or their sum with it.
    """
    top = _digits(left)[::-1]
    units, tens = _digits(right)[-1], _digits(right)[-2]
    tokens: list[str] = []
    partial = []
    for factor in (units, tens):
        row, carry = [], 0
        for digit in top:
            total = digit * factor + carry
            tokens += [str(digit), str(factor), str(total)]
            carry = total // 10
            row.append(total % 10)
        partial.append(row)
    carry = 0
    for a, b in zip(partial[0], [0, *partial[1][:-1]], strict=True):
        total = a + b + carry
        tokens += [str(a), str(b), str(total)]
        carry = total // 10
    return tokens


def _check_by_division(left: int, right: int, result: int) -> list[str]:
    """Long division of the result by the second factor, which must give the first and leave nothing.

    From the top, a line for each digit of the first factor: that digit, it times the units and times the tens of the
    second (with the carry), the digit of the result that comes down, and the remainder's two digits after taking the
    product away (10 more for a borrow). A remainder below zero or above 99 ends it: a true quotient leaves less than
    the divisor.
    """
    expected = _sign(left * right)
    tokens = [expected, _mark(expected == _sign(result))]
    if tokens[-1] == _DIFFER:
        return [*tokens, WRONG]
    units, tens = _digits(right)[-1], _digits(right)[-2]
    high, low = 0, 0
    for quotient, down in zip(_digits(left), _digits(result), strict=True):
        by_units = quotient * units
        by_tens = quotient * tens + by_units // 10
        borrow, d0 = _take_away(down, by_units % 10, 0)
        next_borrow, d1 = _take_away(low, by_tens % 10, borrow)
        fits = high == by_tens // 10 + next_borrow
        numbers = (quotient, by_units, by_tens, down, d0 + 10 * borrow, d1 + 10 * next_borrow)
        tokens += [*map(str, numbers), _mark(fits)]
        if not fits:
            return [*tokens, WRONG]
        high, low = d1, d0
    return [*tokens, RIGHT if (high, low) == (0, 0) else WRONG]


def _take_away(digit: int, other: int, borrow: int) -> tuple[int, int]:
    """Borrow and digit of a difference in one column."""
    left = digit - other - borrow
    return int(left < 0), left % 10
