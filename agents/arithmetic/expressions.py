"""Integer expressions, the order of their operations, and the bounds of the embedded team.

`read` evaluates an expression only to check it against the bounds. The models never see a value.
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
"""Names that replace the numbers in the planner's prompt: a plan does not depend on their values."""

APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


class OutOfBounds(ValueError):
    """A problem that the embedded team cannot solve. The message names the bound that the problem exceeds."""


@dataclass(frozen=True)
class Operation:
    """One step of a plan. Each operand is a number, as text, or the name of an earlier step."""

    name: str
    left: str
    sign: str
    right: str

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}"


@dataclass(frozen=True)
class Expression:
    """An expression within the bounds: its text without redundant parentheses, its steps in post-order, its value."""

    text: str
    operations: tuple[Operation, ...]
    value: int


def read(text: str) -> Expression:
    """Parse an expression such as "(12+7)*3-45".

    Raise OutOfBounds if the text is not an expression or exceeds a bound of the embedded team.
    """
    tree = _parse(text)
    operations: list[Operation] = []
    value = _collect(tree, operations)[1]
    if not operations:
        raise OutOfBounds("the problem has no operation: write at least one, such as 12+7")
    if len(operations) > OPERATIONS_MAX:
        raise OutOfBounds(
            f"{len(operations)} operations are too many; the embedded team solves at most {OPERATIONS_MAX}"
        )
    canonical = ast.unparse(tree)
    nesting = _nesting(canonical)
    if nesting > NESTING_MAX:
        raise OutOfBounds(f"the parentheses are nested {nesting} deep; the embedded team solves at most {NESTING_MAX}")
    return Expression(canonical, tuple(operations), value)


def order(named: str) -> tuple[Operation, ...]:
    """Return the steps of an expression over named numbers, such as "(P + Q) * R"."""
    operations: list[Operation] = []
    _collect_named(ast.parse(named, mode="eval").body, operations)
    return tuple(operations)


def _collect_named(node: ast.expr, operations: list[Operation]) -> str:
    """Append the operations under `node` in post-order. Return the name of its value."""
    if isinstance(node, ast.Name):
        return node.id
    assert isinstance(node, ast.BinOp), ast.dump(node)
    left, right = _collect_named(node.left, operations), _collect_named(node.right, operations)
    operations.append(Operation(STEP_NAMES[len(operations)], left, _SIGNS[type(node.op)], right))
    return operations[-1].name


def _parse(text: str) -> ast.expr:
    stray = re.search(r"[^0-9+\-*() ]", text)
    if stray:
        raise OutOfBounds(
            f"character {stray.group()!r} at position {stray.start() + 1} of {text!r} is not allowed: an expression "
            "consists of whole numbers, + - * and parentheses"
        )
    if text.count("(") > 32:
        raise OutOfBounds(f"the parentheses are nested too deep; the embedded team solves at most {NESTING_MAX}")
    if "**" in text.replace(" ", ""):
        raise OutOfBounds("the embedded team does not know powers (**); its operations are + - *")
    try:
        return ast.parse(re.sub(r"\b0+(?=\d)", "", text.strip()), mode="eval").body
    except SyntaxError as error:
        raise OutOfBounds(f"{text!r} is not a complete expression (near position {error.offset or 1})") from None


def _collect(node: ast.expr, operations: list[Operation]) -> tuple[str, int]:
    """Append the operations under `node` in post-order. Return its text as an operand, and its value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        if node.value > OPERAND_MAX:
            raise OutOfBounds(f"operand {node.value} is too large; the embedded team accepts 0 to {OPERAND_MAX}")
        return str(node.value), node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        sign = _SIGNS[type(node.op)]
        left, a = _collect(node.left, operations)
        right, b = _collect(node.right, operations)
        value = APPLY[sign](a, b)
        if sign == "*":
            _check_factors(a, b)
        if abs(value) > VALUE_MAX:
            raise OutOfBounds(f"{a}{sign}{b} is outside the embedded team's range of {-VALUE_MAX} to {VALUE_MAX}")
        name = STEP_NAMES[len(operations)] if len(operations) < OPERATIONS_MAX else "?"
        operations.append(Operation(name, left, sign, right))
        return name, value
    if isinstance(node, ast.UnaryOp):
        raise OutOfBounds("signed operands are not accepted: write 0-5 for -5; results may be negative")
    if isinstance(node, ast.Call):
        raise OutOfBounds("an operator is missing before a parenthesis: write 3*(4+5), not 3(4+5)")
    raise OutOfBounds("an expression consists of whole numbers, + - * and parentheses")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def read_operation(text: str) -> tuple[int, str, int]:
    """Parse one step such as "-12*7" or "5--3": two integers, possibly negative, and an operator.

    Raise OutOfBounds if the text is not such a step or exceeds a bound.
    """
    match = re.fullmatch(r"(-?\d+)([+*-])(-?\d+)", text)
    if not match:
        raise OutOfBounds(f"{text!r} is not a step: write two whole numbers with one of + - * between them")
    left, sign, right = int(match[1]), match[2], int(match[3])
    for value in (left, right):
        if abs(value) > VALUE_MAX:
            raise OutOfBounds(f"{value} is outside the embedded team's range of {-VALUE_MAX} to {VALUE_MAX}")
    if sign == "*":
        _check_factors(left, right)
    return left, sign, right


def _check_factors(left: int, right: int) -> None:
    if min(abs(left), abs(right)) > FACTOR_MAX:
        raise OutOfBounds(
            f"product {left}*{right} is too hard; the embedded team needs one factor of at most {FACTOR_MAX}"
        )
