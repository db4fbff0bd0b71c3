"""The right reply to each prompt of the embedded team. Fake engines and tests use it in place of the models."""

import re

from agents.arithmetic import scratchpad, wording
from agents.arithmetic.expressions import NUMBER_NAMES, Expression, Operation, order, read


def reply(prompt: str) -> str:
    """Return the right reply to a prompt of the planner, solver or critic, with its tokens joined by blanks."""
    if prompt.startswith(scratchpad.AT_ONCE):
        return " ".join(scratchpad.at_once_reply(_expression(prompt[1:].strip()).value))
    if prompt[0] not in "+-":
        return " ".join(scratchpad.plan_reply(plan(prompt)))
    tokens = prompt.split()
    if tokens[3] == "=":
        return " ".join(scratchpad.worked_check(*_claim(tokens)))
    left, sign, right = tokens[0], tokens[1], tokens[2]
    digits = tokens[3:]
    second = digits[5::5] if sign == "*" else digits[5:]
    return " ".join(scratchpad.worked_step(_number(left, digits[:5]), sign, _number(right, second)))


def plan(prompt: str) -> tuple[Operation, ...]:
    """Return the right steps for a prompt of the planner."""
    return order(
        wording.recognise_named(re.sub(f"[{NUMBER_NAMES}]", "1", prompt)) if re.search("[a-z]", prompt) else prompt
    )


def _claim(tokens: list[str]) -> tuple[int, str, int, int]:
    left, sign, right, _, result, *digits = tokens
    if sign == "*":
        top, second, _, claimed = (row.split()[::-1] for row in " ".join(digits).split(";")[:4])
    else:
        top, second, claimed = digits[:5], digits[5:10], digits[10:]
    return _number(left, top), sign, _number(right, second), _number(result, claimed)


def _number(sign: str, digits: list[str]) -> int:
    """Return a number from its sign and its digits, units first."""
    return int(sign + "".join(reversed(digits)))


def _expression(problem: str) -> Expression:
    return read(wording.recognise(problem) if re.search("[a-z]", problem) else problem)
