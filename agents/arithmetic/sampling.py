"""Random problems and steps within the embedded team's bounds, and the rule that holds some out of training.

Every function takes the caller's random.Random, so that a seed gives the same data on every machine.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import accumulate

from agents.arithmetic import wording
from agents.arithmetic.expressions import (
    APPLY,
    DIGITS,
    FACTOR_MAX,
    NESTING_MAX,
    OPERAND_MAX,
    OPERATIONS_MAX,
    VALUE_MAX,
    Expression,
    OutOfBounds,
    read,
)

HELD_OUT_SHARE = 0.02
PLACES = (1, 10, 100, 1000, 10_000)


@dataclass(frozen=True)
class Problem:
    """A problem as a user would write it, and the expression that it asks for."""

    text: str
    expression: Expression


def is_held_out(text: str) -> bool:
    """Return True if training never sees `text`: 2% of texts, chosen by a hash that is the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def draw_problem(rng: random.Random) -> Problem:
    """Return an expression or a word problem, each with probability 0.5."""
    return draw_expression(rng) if rng.random() < 0.5 else draw_word_problem(rng)


def draw_expression(rng: random.Random) -> Problem:
    """Return an expression of one to six operations, more often many. Most products have a small factor.

    Two of three expressions are the most deeply nested of several draws, because few random trees need nested
    parentheses.
    """
    return max((_draw_tree(rng) for _ in range(rng.choice((1, 4, 12)))), key=lambda p: _nesting(p.text))


def _draw_tree(rng: random.Random) -> Problem:
    while True:
        operations = rng.choices(range(1, OPERATIONS_MAX + 1), weights=(1, 2, 3, 4, 5, 6))[0]
        try:
            expression = read(_tree(rng, operations, depth=0))
        except OutOfBounds:
            continue
        return Problem(expression.text, expression)


def _nesting(text: str) -> int:
    return max(accumulate((character == "(") - (character == ")") for character in text))


def draw_word_problem(rng: random.Random) -> Problem:
    """Return a word problem within the bounds. Wordings with more numbers are drawn more often."""
    pattern = rng.choices(wording.GRAMMAR, weights=[len(w.numbers) for w in wording.GRAMMAR])[0]
    while True:
        values = {slot: _number(rng) for slot in pattern.numbers}
        try:
            expression = read(pattern.fill(values))
        except OutOfBounds:
            continue
        return Problem(pattern.write(rng, values), expression)


def draw_step(rng: random.Random) -> tuple[int, str, int]:
    """Return a step within the bounds: half come from random problems, half spread evenly over lengths and signs."""
    if rng.random() < 0.5:
        return rng.choice(steps_of(draw_problem(rng).expression))
    while True:
        left, sign, right = _signed(rng), rng.choice("+-*"), _signed(rng)
        if sign == "*":
            right = rng.choice((-1, 1)) * rng.randint(0, FACTOR_MAX)
        elif rng.random() < 0.2:
            right = rng.choice((-1, 1)) * (left + rng.choice((0, 1, 10, 100, -1, -10, -100)))
        if max(abs(right), abs(APPLY[sign](left, right))) <= VALUE_MAX:
            return left, sign, right


def draw_wrong_result(rng: random.Random, left: int, sign: str, right: int) -> int:
    """Return a wrong result such as a slip would give."""
    true = APPLY[sign](left, right)
    while True:
        result = _slip(rng, left, sign, right, true)
        if result != true and abs(result) <= VALUE_MAX:
            return result


def steps_of(expression: Expression) -> list[tuple[int, str, int]]:
    """Return the expression's steps with numbers as operands: left operand, operator, right operand."""
    values: dict[str, int] = {}
    steps = []
    for operation in expression.operations:
        left, right = (values[o] if o in values else int(o) for o in (operation.left, operation.right))
        values[operation.name] = APPLY[operation.sign](left, right)
        steps.append((left, operation.sign, right))
    return steps


def _tree(rng: random.Random, operations: int, depth: int) -> str:
    """Return an expression of that many operations, with parentheses added at random."""
    if operations == 0:
        return str(_number(rng))
    sign = rng.choice("++--*")
    if sign == "*" and operations == 1 and rng.random() < 0.7:
        pair = [str(rng.randint(0, FACTOR_MAX)), str(_number(rng))]
        rng.shuffle(pair)
        return "*".join(pair)
    # Chains nest the deepest. They would be rare if every split were equally likely.
    left = rng.choice((0, operations - 1, rng.randint(0, operations - 1)))
    return sign.join(_side(rng, count, depth) for count in (left, operations - 1 - left))


def _side(rng: random.Random, operations: int, depth: int) -> str:
    grouped = operations > 0 and depth < NESTING_MAX and rng.random() < 0.5
    text = _tree(rng, operations, depth + grouped)
    return f"({text})" if grouped else text


def _number(rng: random.Random) -> int:
    """Return an operand of one to three digits. A tenth of the operands are rounded."""
    number = rng.choice(
        (rng.randint(0, 9), rng.randint(10, 99), rng.randint(0, FACTOR_MAX), rng.randint(100, OPERAND_MAX))
    )
    return _rounded(rng, number) if rng.random() < 0.1 else number


def _signed(rng: random.Random) -> int:
    number = rng.randint(0, int("9" * rng.randint(1, DIGITS)))
    return (_rounded(rng, number) if rng.random() < 0.2 else number) * rng.choice((-1, 1))


def _rounded(rng: random.Random, number: int) -> int:
    place = rng.choice(PLACES[1:])
    return number // place * place or number


def _slip(rng: random.Random, left: int, sign: str, right: int, true: int) -> int:
    kind = rng.randrange(7)
    if kind == 0:  # one wrong digit
        return true + rng.randint(-9, 9) * rng.choice(PLACES)
    if kind == 1:  # a lost or invented carry
        return true + rng.choice((-1, 1)) * rng.choice(PLACES)
    if kind == 2:  # the wrong sign
        return -true
    if kind == 3:  # two swapped digits
        digits = list(str(abs(true)))
        i = rng.randrange(len(digits))
        digits[i - 1], digits[i] = digits[i], digits[i - 1]
        return int("".join(digits)) * (-1 if true < 0 else 1)
    if kind == 4:  # the wrong operation
        return APPLY[rng.choice("+-*")](left, right)
    if kind == 5:  # a slightly wrong operand
        return APPLY[sign](left + rng.choice((-10, -1, 1, 10)), right)
    return _signed(rng)
