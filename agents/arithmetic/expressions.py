"""Integer expressions: reading, bounds, and the order in which they are worked.

Owns the bounds of the embedded team. `read` evaluates the expression only to hold it against those bounds; the
models are never told a value.
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

OPERAND_MAX = 999
OPERATIONS_MAX = 6
NESTING_MAX = 3
FACTOR_MAX = 99
DIGITS = 5
VALUE_MAX = 10**DIGITS - 1
STEP_NAMES = "ABCDEF"
NUMBER_NAMES = "PQRSTUV"
"""For the planner, which does not need to know a number to say what is to be done with it."""

APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


class OutOfBounds(ValueError):
    """The problem is not one the embedded team can work; the message says what would be."""


@dataclass(frozen=True)
class Operation:
    """One step of a plan. Operands are written numbers or the names of earlier steps."""

    name: str
    left: str
    sign: str
    right: str

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}"


@dataclass(frozen=True)
class Expression:
    """A problem within bounds: its text with no needless parentheses, and its steps in order (post-order)."""

    text: str
    operations: tuple[Operation, ...]
    value: int


def read(text: str) -> Expression:
    """Read an expression such as "(12+7)*3-45".

    Raises OutOfBounds, naming the bound, when the text is no such expression or leaves the team's range.
    """
    tree = _parse(text)
    operations: list[Operation] = []
    value = _work(tree, operations)[1]
    if not operations:
        raise OutOfBounds("there is nothing to compute: write at least one operation, such as 12+7")
    if len(operations) > OPERATIONS_MAX:
        raise OutOfBounds(f"{len(operations)} operations; the embedded team works up to {OPERATIONS_MAX}")
    canonical = ast.unparse(tree)
    nesting = _nesting(canonical)
    if nesting > NESTING_MAX:
        raise OutOfBounds(f"parentheses nested {nesting} deep; the embedded team works up to {NESTING_MAX}")
    return Expression(canonical, tuple(operations), value)


def order(named: str) -> tuple[Operation, ...]:
    """The steps of an expression over the names of numbers, such as "(P + Q) * R"."""
    done: list[Operation] = []
    _order(ast.parse(named, mode="eval").body, done)
    return tuple(done)


def _order(node: ast.expr, done: list[Operation]) -> str:
    if isinstance(node, ast.Name):
        return node.id
    assert isinstance(node, ast.BinOp), ast.dump(node)
    left, right = _order(node.left, done), _order(node.right, done)
    done.append(Operation(STEP_NAMES[len(done)], left, _SIGNS[type(node.op)], right))
    return done[-1].name


def _parse(text: str) -> ast.expr:
    stray = re.search(r"[^0-9+\-*() ]", text)
    if stray:
        raise OutOfBounds(
            f"character {stray.group()!r} at position {stray.start() + 1} of {text!r}: an expression holds "
            "whole numbers, + - * and parentheses"
        )
    if text.count("(") > 32:
        raise OutOfBounds(f"parentheses nested too deep; the embedded team works up to {NESTING_MAX}")
    if "**" in text.replace(" ", ""):
        raise OutOfBounds("powers (**) are not among the embedded team's operations: + - *")
    try:
        return ast.parse(re.sub(r"\b0+(?=\d)", "", text.strip()), mode="eval").body
    except SyntaxError as error:
        raise OutOfBounds(f"{text!r} is not a complete expression (near position {error.offset or 1})") from None


def _work(node: ast.expr, done: list[Operation]) -> tuple[str, int]:
    """Append the operations under `node` in post-order; return its operand text and value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        if node.value > OPERAND_MAX:
            raise OutOfBounds(f"operand {node.value}; the embedded team takes 0 to {OPERAND_MAX}")
        return str(node.value), node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        sign = _SIGNS[type(node.op)]
        left, a = _work(node.left, done)
        right, b = _work(node.right, done)
        value = APPLY[sign](a, b)
        if sign == "*":
            _check_factors(a, b)
        if abs(value) > VALUE_MAX:
            raise OutOfBounds(f"{a}{sign}{b} leaves the embedded team's range of {-VALUE_MAX} to {VALUE_MAX}")
        name = STEP_NAMES[len(done)] if len(done) < OPERATIONS_MAX else "?"
        done.append(Operation(name, left, sign, right))
        return name, value
    if isinstance(node, ast.UnaryOp):
        raise OutOfBounds("signed operands are out of range: write 0-5 for -5; results may be negative")
    if isinstance(node, ast.Call):
        raise OutOfBounds("a sign is missing before a parenthesis: write 3*(4+5)")
    raise OutOfBounds("an expression holds whole numbers, + - * and parentheses")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def read_operation(text: str) -> tuple[int, str, int]:
    """Read one worked step such as "-12*7" or "5--3": two integers, possibly negative, and a sign."""
    match = re.fullmatch(r"(-?\d+)([+*-])(-?\d+)", text)
    if not match:
        raise OutOfBounds(f"{text!r} is not a step of two whole numbers and one of + - *")
    left, sign, right = int(match[1]), match[2], int(match[3])
    for value in (left, right):
        if abs(value) > VALUE_MAX:
            raise OutOfBounds(f"{value} leaves the embedded team's range of {-VALUE_MAX} to {VALUE_MAX}")
    if sign == "*":
        _check_factors(left, right)
    return left, sign, right


def _check_factors(left: int, right: int) -> None:
    if min(abs(left), abs(right)) > FACTOR_MAX:
        raise OutOfBounds(f"product {left}*{right}; the embedded team needs one factor of at most {FACTOR_MAX}")
