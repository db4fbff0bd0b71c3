"""The notation of the embedded models: how a step is put to them and how it is worked, digit by digit.

Numbers are a sign and five digits from the units up, laid out so that what belongs together stays equally far apart
all along a row: the digits of a column, and later its result. A column's result is one number, digit and carry in
one. Tokens are separated by blanks. The writing half makes the training data, the reading half serves the roles.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from agents.arithmetic.expressions import DIGITS, NUMBER_NAMES, STEP_NAMES, Operation

RIGHT, WRONG = "right", "wrong"
AT_ONCE = "?"
_MATCH, _DIFFER = ".", "!"
_ROW = ";"


def step_prompt(left: int, sign: str, right: int) -> str:
    """A step for the solver: signs and operation, the digits of the first number, then of the second.

    Of a product the smaller factor comes second, and its units, then its tens, stand under every digit of the first.
    """
    left, right = _smaller_factor_second(left, sign, right)
    return _tokens(_sign(left), sign, _sign(right), *_digits(left), *_under(sign, right))


def claim_prompt(left: int, sign: str, right: int, result: int) -> str:
    """A step and its claimed result for the critic: signs, then the digits of the three numbers.

    Of a product they are written from the top; two digits do for its second factor, and "=" keeps the place where the
    check multiplies.
    """
    left, right = _smaller_factor_second(left, sign, right)
    signs = (_sign(left), sign, _sign(right), "=", _sign(result))
    if sign != "*":
        return _tokens(*signs, *_digits(left), *_digits(right), *_digits(result))
    first, second, product = _from_the_top(left, right, result)
    return _tokens(*signs, *first, _ROW, *second, _ROW, "=", _ROW, *product, _ROW)


def at_once_prompt(problem: str) -> str:
    """A whole problem for the solver, to be answered without steps."""
    return f"{AT_ONCE} {problem}"


def plan_prompt(problem: str) -> str:
    """A problem for the planner: its numbers by name, in order. "(12 + 7) * 3" becomes "(P + Q) * R"."""
    names = iter(NUMBER_NAMES)
    return re.sub(r"\d+", lambda _: next(names), problem)


def plan_reply(operations: Iterable[Operation]) -> list[str]:
    """The planner's reply, four tokens a step: A= P + Q ;B= A * R"""
    return [
        token
        for index, o in enumerate(operations)
        for token in (f"{';' if index else ''}{o.name}=", o.left, o.sign, o.right)
    ]


def at_once_reply(value: int) -> list[str]:
    """The solver's answer to a whole problem: sign and digits, from the top."""
    return ["=", _sign(value), *map(str, _digits(value)[::-1])]


def worked_step(left: int, sign: str, right: int) -> list[str]:
    """The solver's reply: its rows, the last of which holds the result, and the sign."""
    left, right = _smaller_factor_second(left, sign, right)
    if sign == "*":
        return [*_multiply(left, right), _sign(left * right)]
    worked = _sum(left, sign, right)
    return [*worked.tokens, worked.sign]


def worked_check(left: int, sign: str, right: int, result: int) -> list[str]:
    """The critic's reply: another computation than the solver's, marks where it agrees and differs, the verdict.

    A sum or difference is undone, which must give the first number back. A product is checked by casting out.
    """
    left, right = _smaller_factor_second(left, sign, right)
    if sign == "*":
        return _check_by_casting_out(left, right, result)
    inverse = _sum(result, _flip(sign), right)
    marks = [_mark(column % 10 == digit) for column, digit in zip(inverse.columns, _digits(left), strict=True)]
    marks += [_mark(inverse.columns[-1] < 10), _mark(inverse.sign == _sign(left))]
    return [*inverse.tokens, inverse.sign, *marks, RIGHT if _DIFFER not in marks else WRONG]


def read_plan(text: str, problem: str) -> list[Operation]:
    """Read the planner's reply to a problem, with its numbers back in place.

    Raises ValueError when it is not a list of steps in order, each over numbers of the problem and earlier steps.
    """
    known = dict(zip(NUMBER_NAMES, re.findall(r"\d+", problem), strict=False))
    steps: list[Operation] = []
    for line in text.replace(" ", "").split(";"):
        match = re.fullmatch(r"([A-F])=([A-Z])([-+*])([A-Z])", line)
        if not match:
            raise ValueError(f"not a step: {line!r}")
        name, left, sign, right = match.groups()
        if name != STEP_NAMES[len(steps)] or left not in known or right not in known:
            raise ValueError(f"step {line!r} is out of order")
        steps.append(Operation(name, known[left], sign, known[right]))
        known[name] = name
    return steps


def read_result(text: str) -> int:
    """The result in a solver's worked step. Raises ValueError when there is none."""
    match = re.fullmatch(rf".*[-+;]((?: \d+){{{DIGITS}}}) ([-+])", text)
    if not match:
        raise ValueError(f"no result in the reply {text[-40:]!r}")
    columns = [int(column) % 10 for column in match[1].split()]
    return int(match[2] + "".join(map(str, reversed(columns))))


def read_at_once(text: str) -> int:
    """The solver's answer to a whole problem. Raises ValueError when there is none."""
    match = re.fullmatch(rf"= ([-+])((?: \d){{{DIGITS}}})", text)
    if not match:
        raise ValueError(f"no answer in the reply {text[-40:]!r}")
    return int(match[1] + match[2].replace(" ", ""))


def read_verdict(text: str) -> bool:
    """The critic's last word. Raises ValueError when it is neither "right" nor "wrong"."""
    for word, verdict in ((RIGHT, True), (WRONG, False)):
        if text.endswith(word):
            return verdict
    raise ValueError(f"no verdict in the reply {text[-40:]!r}")


def _tokens(*tokens: object) -> str:
    return " ".join(map(str, tokens))


def _smaller_factor_second(left: int, sign: str, right: int) -> tuple[int, int]:
    return (right, left) if sign == "*" and abs(left) < abs(right) else (left, right)


def _under(sign: str, right: int) -> list[int]:
    digits = _digits(right)
    return [digits[0]] * DIGITS + [digits[1]] * DIGITS if sign == "*" else list(digits)


def _sign(value: int) -> str:
    return "-" if value < 0 else "+"


def _digits(value: int) -> tuple[int, ...]:
    """Five digits from the units up. A number beyond five digits is the caller's defect."""
    assert abs(value) < 10**DIGITS, value
    return tuple(int(d) for d in f"{abs(value):0{DIGITS}d}"[::-1])


def _mark(same: bool) -> str:
    return _MATCH if same else _DIFFER


@dataclass(frozen=True)
class _Sum:
    """A signed sum or difference worked in columns from the units up, each the digit and 10 for carry or borrow."""

    tokens: list[str]
    sign: str
    columns: Sequence[int]


def _sum(left: int, sign: str, right: int) -> _Sum:
    """Compare magnitudes as far as each column, say whether they add or subtract, then work the columns."""
    upper, lower = _digits(left), _digits(right)
    right_sign = _sign(right) if sign == "+" else _flip(_sign(right))
    steps = [">" if a > b else "<" if a < b else "" for a, b in zip(upper, lower, strict=True)]
    states = list(accumulate(steps, lambda so_far, step: step or so_far, initial="="))[1:]
    adds = _sign(left) == right_sign
    if states[-1] == "<":
        upper, lower = lower, upper
    columns, carry = [], 0
    for a, b in zip(upper, lower, strict=True):
        columns.append(a + b + carry if adds else (a - b - carry) % 10 + 10 * (a < b + carry))
        carry = columns[-1] // 10
    larger = {">": _sign(left), "<": right_sign, "=": "+"}[states[-1]]
    result_sign = _sign(left) if adds else larger
    return _Sum([*states, "+" if adds else "-", *map(str, columns)], result_sign, columns)


def _flip(sign: str) -> str:
    return "+" if sign == "-" else "-"


def _multiply(left: int, right: int) -> list[str]:
    """A row times the units and a row times the tens, with carries; the digits of both; the row of their sum.

    The digits of the tens stand under their own columns; the sum takes them one column up.
    """
    by_units, by_tens = (_with_carries([digit * factor for digit in _digits(left)]) for factor in _digits(right)[:2])
    units, tens = ([column % 10 for column in row] for row in (by_units, by_tens))
    total = _with_carries([a + b for a, b in zip(units, [0, *tens[:-1]], strict=True)])
    rows = (by_units, by_tens, units, tens, total)
    return [token for index, row in enumerate(rows) for token in (*([_ROW] if index else []), *map(str, row))]


def _with_carries(columns: Sequence[int]) -> list[int]:
    """Each column plus the tens of the one before."""
    return list(accumulate(columns, lambda before, column: column + before // 10))


def _check_by_casting_out(left: int, right: int, result: int) -> list[str]:
    """The sign; the remainders by 9 and by 11, digit by digit; the last digit.

    Multiplied is before the result is looked at: a model that sees the result's remainder first learns to copy it.
    It misses what is off by a multiple of 990, one in as many of the results that have nothing to do with the right
    one, and no slip in a single digit, carry, sign or order of neighbours.
    """
    expected = _sign(left * right)
    tokens, marks = [expected], [_mark(expected == _sign(result))]
    tokens += marks
    numbers = _from_the_top(left, right, result)
    for divisor in (9, 11):
        first, second, product = (_remainders(digits, divisor) for digits in numbers)
        expected_remainder = first[-1] * second[-1] % divisor
        marks.append(_mark(expected_remainder == product[-1]))
        rows = (first, second, [expected_remainder], product)
        tokens += [*(token for row in rows for token in (*map(str, row), _ROW)), marks[-1]]
    last = abs(left * right) % 10
    marks.append(_mark(last == abs(result) % 10))
    return [*tokens, str(last), marks[-1], RIGHT if _DIFFER not in marks else WRONG]


def _from_the_top(left: int, right: int, result: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return _digits(left)[::-1], _digits(right)[1::-1], _digits(result)[::-1]


def _remainders(digits: Sequence[int], divisor: int) -> list[int]:
    """The remainder of the number as far as each of its digits, from the top."""
    return list(accumulate(digits, lambda before, digit: (10 * before + digit) % divisor, initial=0))[1:]
