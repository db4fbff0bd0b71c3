"""Problems and steps drawn at random within the embedded team's bounds, and the split that holds some out.

Every draw takes the caller's random.Random, so that a seed gives the same data anywhere.
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
    """A problem as a user would write it, and the expression it asks for."""

    text: str
    expression: Expression


def is_held_out(text: str) -> bool:
    """Whether training never sees `text`: two in a hundred, by a hash that is the same everywhere."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def draw_problem(rng: random.Random) -> Problem:
    """An expression or a word problem, half of each."""
    return draw_expression(rng) if rng.random() < 0.5 else draw_word_problem(rng)


def draw_expression(rng: random.Random) -> Problem:
    """One to six operations, more often many; the shape is a random tree, products mostly with a small factor.

    Two of three are the deepest nested of several draws: few random trees need parentheses in parentheses.
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
    """A wording of the grammar, the longer ones more often, with numbers that keep it within bounds."""
    pattern = rng.choices(wording.GRAMMAR, weights=[len(w.numbers) for w in wording.GRAMMAR])[0]
    while True:
        values = {slot: _number(rng) for slot in pattern.numbers}
        try:
            expression = read(pattern.fill(values))
        except OutOfBounds:
            continue
        return Problem(pattern.write(rng, values), expression)


def draw_step(rng: random.Random) -> tuple[int, str, int]:
    """A step within bounds: half as they come up in problems, half spread evenly over lengths and signs."""
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
    """A result that is not the right one, as a slip would give it."""
    true = APPLY[sign](left, right)
    while True:
        result = _slip(rng, left, sign, right, true)
        if result != true and abs(result) <= VALUE_MAX:
            return result


def steps_of(expression: Expression) -> list[tuple[int, str, int]]:
    """The expression's steps with their operands worked out."""
    values: dict[str, int] = {}
    steps = []
    for operation in expression.operations:
        left, right = (values[o] if o in values else int(o) for o in (operation.left, operation.right))
        values[operation.name] = APPLY[operation.sign](left, right)
        steps.append((left, operation.sign, right))
    return steps


def _tree(rng: random.Random, operations: int, depth: int) -> str:
    """An expression of that many operations, written with parentheses where chance or the tree asks for them."""
    if operations == 0:
        return str(_number(rng))
    sign = rng.choice("++--*")
    if sign == "*" and operations == 1 and rng.random() < 0.7:
        pair = [str(rng.randint(0, FACTOR_MAX)), str(_number(rng))]
        rng.shuffle(pair)
        return "*".join(pair)
    # Chains, which nest the deepest, would be rare if every split were as likely.
    left = rng.choice((0, operations - 1, rng.randint(0, operations - 1)))
    return sign.join(_side(rng, count, depth) for count in (left, operations - 1 - left))


def _side(rng: random.Random, operations: int, depth: int) -> str:
    grouped = operations > 0 and depth < NESTING_MAX and rng.random() < 0.5
    text = _tree(rng, operations, depth + grouped)
    return f"({text})" if grouped else text


def _number(rng: random.Random) -> int:
    """An operand, every length as often, a tenth of them round."""
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
    if kind == 0:  # one digit read wrong
        return true + rng.randint(-9, 9) * rng.choice(PLACES)
    if kind == 1:  # a carry lost or made up
        return true + rng.choice((-1, 1)) * rng.choice(PLACES)
    if kind == 2:  # the sign
        return -true
    if kind == 3:  # two digits exchanged
        digits = list(str(abs(true)))
        i = rng.randrange(len(digits))
        digits[i - 1], digits[i] = digits[i], digits[i - 1]
        return int("".join(digits)) * (-1 if true < 0 else 1)
    if kind == 4:  # another operation
        return APPLY[rng.choice("+-*")](left, right)
    if kind == 5:  # one operand off by a little
        return APPLY[sign](left + rng.choice((-10, -1, 1, 10)), right)
    return _signed(rng)
