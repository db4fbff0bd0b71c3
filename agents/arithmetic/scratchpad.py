"""The notation of the embedded models: how prompts state a step, and how replies solve or check it digit by digit.

A number is a sign and five digits, units first. Along a whole row, the digits of a column and its result keep the same
distance in tokens. The result of a column is one number that holds digit and carry. Tokens are separated by blanks. The
writing functions make the training data; the reading functions serve the roles.
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
    """Return the solver's prompt for a step: signs and operator, the digits of the first number, then of the second.

    In a product, the smaller factor comes second. Its units are repeated under every digit of the first factor, then
    its tens.
    """
    left, right = _smaller_factor_second(left, sign, right)
    return _tokens(_sign(left), sign, _sign(right), *_digits(left), *_under(sign, right))


def claim_prompt(left: int, sign: str, right: int, result: int) -> str:
    """Return the critic's prompt for a step and its claimed result: signs, then the digits of the three numbers.

    In a product, the digits are written from the highest down. The second factor has only two digits. "=" keeps the
    place at which the check multiplies.
    """
    left, right = _smaller_factor_second(left, sign, right)
    signs = (_sign(left), sign, _sign(right), "=", _sign(result))
    if sign != "*":
        return _tokens(*signs, *_digits(left), *_digits(right), *_digits(result))
    first, second, product = _from_the_top(left, right, result)
    return _tokens(*signs, *first, _ROW, *second, _ROW, "=", _ROW, *product, _ROW)


def at_once_prompt(problem: str) -> str:
    """Return the solver's prompt for a whole problem, to be answered without steps."""
    return f"{AT_ONCE} {problem}"


def plan_prompt(problem: str) -> str:
    """Return the planner's prompt: the problem with named numbers. "(12 + 7) * 3" becomes "(P + Q) * R"."""
    names = iter(NUMBER_NAMES)
    return re.sub(r"\d+", lambda _: next(names), problem)


def plan_reply(operations: Iterable[Operation]) -> list[str]:
    """Return the planner's reply, four tokens for each step: A= P + Q ;B= A * R"""
    return [
        token
        for index, o in enumerate(operations)
        for token in (f"{';' if index else ''}{o.name}=", o.left, o.sign, o.right)
    ]


def at_once_reply(value: int) -> list[str]:
    """Return the solver's answer to a whole problem: the sign, then the digits from the highest down."""
    return ["=", _sign(value), *map(str, _digits(value)[::-1])]


def worked_step(left: int, sign: str, right: int) -> list[str]:
    """Return the solver's reply to a step: its rows, of which the last holds the result, then the sign."""
    left, right = _smaller_factor_second(left, sign, right)
    if sign == "*":
        return [*_multiply(left, right), _sign(left * right)]
    worked = _sum(left, sign, right)
    return [*worked.tokens, worked.sign]


def worked_check(left: int, sign: str, right: int, result: int) -> list[str]:
    """Return the critic's reply: a computation unlike the solver's, marks where it agrees or differs, the verdict.

    The critic undoes a sum or difference, which must give the first number back. It checks a product by casting out.
    """
    left, right = _smaller_factor_second(left, sign, right)
    if sign == "*":
        return _check_by_casting_out(left, right, result)
    inverse = _sum(result, _flip(sign), right)
    marks = [_mark(column % 10 == digit) for column, digit in zip(inverse.columns, _digits(left), strict=True)]
    marks += [_mark(inverse.columns[-1] < 10), _mark(inverse.sign == _sign(left))]
    return [*inverse.tokens, inverse.sign, *marks, RIGHT if _DIFFER not in marks else WRONG]


def read_plan(text: str, problem: str) -> list[Operation]:
    """Return the steps in the planner's reply, with the problem's numbers in place of their names.

    Raise ValueError unless the reply is a list of steps in order, each over numbers of the problem and earlier steps.
    """
    known = dict(zip(NUMBER_NAMES, re.findall(r"\d+", problem), strict=False))
    steps: list[Operation] = []
    for line in text.replace(" ", "").split(";"):
        if len(steps) == len(STEP_NAMES):
            raise ValueError(f"there are more than {len(STEP_NAMES)} steps")
        match = re.fullmatch(r"([A-F])=([A-Z])([-+*])([A-Z])", line)
        if not match:
            raise ValueError(f"{line!r} is not a step such as A=P+Q")
        name, left, sign, right = match.groups()
        if name != STEP_NAMES[len(steps)] or left not in known or right not in known:
            raise ValueError(f"step {line!r} is out of order, or uses a name that is not defined before it")
        steps.append(Operation(name, known[left], sign, known[right]))
        known[name] = name
    return steps


def read_result(text: str) -> int:
    """Return the result in the solver's reply to a step. Raise ValueError if there is none."""
    match = re.fullmatch(rf".*[-+;]((?: \d+){{{DIGITS}}}) ([-+])", text)
    if not match:
        raise ValueError(f"the reply {text[-40:]!r} does not end in a row of {DIGITS} digits and a sign")
    columns = [int(column) % 10 for column in match[1].split()]
    return int(match[2] + "".join(map(str, reversed(columns))))


def read_at_once(text: str) -> int:
    """Return the solver's answer to a whole problem. Raise ValueError if there is none."""
    match = re.fullmatch(rf"= ([-+])((?: \d){{{DIGITS}}})", text)
    if not match:
        raise ValueError(f"the reply {text[-40:]!r} is not =, a sign and {DIGITS} digits")
    return int(match[1] + match[2].replace(" ", ""))


def read_verdict(text: str) -> bool:
    """Return True if the critic's reply ends in "right", False if in "wrong". Raise ValueError otherwise."""
    for word, verdict in ((RIGHT, True), (WRONG, False)):
        if text.endswith(word):
            return verdict
    raise ValueError(f"the reply {text[-40:]!r} ends in neither {RIGHT} nor {WRONG}")


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
    """Return the five digits of a number, units first."""
    assert abs(value) < 10**DIGITS, value
    return tuple(int(d) for d in f"{abs(value):0{DIGITS}d}"[::-1])


def _mark(same: bool) -> str:
    return _MATCH if same else _DIFFER


@dataclass(frozen=True)
class _Sum:
    """A signed sum or difference in columns, units first. A column is its digit, plus 10 for a carry or borrow."""

    tokens: list[str]
    sign: str
    columns: Sequence[int]


def _sum(left: int, sign: str, right: int) -> _Sum:
    """Compare the magnitudes up to each column, state whether they add or subtract, then solve the columns."""
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
    """Return five rows: times the units and times the tens, with carries; the digits of both; their sum.

    The digits of the tens are written in their own columns; the sum shifts them up by one column.
    """
    by_units, by_tens = (_with_carries([digit * factor for digit in _digits(left)]) for factor in _digits(right)[:2])
    units, tens = ([column % 10 for column in row] for row in (by_units, by_tens))
    total = _with_carries([a + b for a, b in zip(units, [0, *tens[:-1]], strict=True)])
    rows = (by_units, by_tens, units, tens, total)
    return [token for index, row in enumerate(rows) for token in (*([_ROW] if index else []), *map(str, row))]


def _with_carries(columns: Sequence[int]) -> list[int]:
    """Add the carry of each column to the next one."""
    return list(accumulate(columns, lambda before, column: column + before // 10))


def _check_by_casting_out(left: int, right: int, result: int) -> list[str]:
    """Check the sign, the remainders by 9 and by 11 (digit by digit), and the last digit.

    The check multiplies before it reads the result: a model that sees the result's remainder first learns to copy it.
    It misses results that are wrong by a multiple of 990, which is one in 990 of unrelated results. It catches every
    slip in a single digit, a carry, the sign or the order of two neighbouring digits.
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
    """Return the remainder of the number up to each of its digits, from the highest down."""
    return list(accumulate(digits, lambda before, digit: (10 * before + digit) % divisor, initial=0))[1:]
