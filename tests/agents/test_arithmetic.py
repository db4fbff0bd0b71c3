"""The embedded team's bounds, notation and roles, compared with Python's own arithmetic."""

import random
from collections import Counter
from contextlib import suppress
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.arithmetic import oracle, sampling, scratchpad, wording
from agents.arithmetic.expressions import APPLY, NESTING_MAX, OPERATIONS_MAX, VALUE_MAX, order, read
from agents.arithmetic.roles import ArithmeticCritic, ArithmeticPlanner, ArithmeticSolver, as_read
from agents.role import ReplyUnusable, TaskRefused
from agents.tasks import AnswerTask, CritiqueTask, Plan, PlanTask, Solution, SolveTask, Step

SEEDS = st.integers(0, 2**32)


@given(SEEDS)
def test_value_of_an_expression_equals_eval(seed: int) -> None:
    problem = sampling.draw_expression(random.Random(seed))
    assert problem.expression.value == eval(problem.text)


@given(SEEDS)
def test_drawn_problems_are_within_the_bounds(seed: int) -> None:
    expression = sampling.draw_problem(random.Random(seed)).expression
    assert 1 <= len(expression.operations) <= OPERATIONS_MAX
    steps = sampling.steps_of(expression)
    assert all(
        abs(value) <= VALUE_MAX for left, sign, right in steps for value in (left, right, APPLY[sign](left, right))
    )
    assert all(min(abs(left), abs(right)) <= 99 for left, sign, right in steps if sign == "*")


@given(SEEDS)
def test_plan_of_an_expression_gives_its_value(seed: int) -> None:
    expression = sampling.draw_expression(random.Random(seed)).expression
    values: dict[str, int] = {}
    prompt = scratchpad.plan_prompt(expression.text)
    for operation in scratchpad.read_plan(" ".join(scratchpad.plan_reply(order(prompt))), expression.text):
        left, right = (values[o] if o in values else int(o) for o in (operation.left, operation.right))
        values[operation.name] = APPLY[operation.sign](left, right)
    assert list(values.values())[-1] == expression.value


@given(SEEDS)
def test_word_problem_is_recognised_as_its_expression(seed: int) -> None:
    problem = sampling.draw_word_problem(random.Random(seed))
    assert read(wording.recognise(problem.text.title())) == problem.expression
    written = " ".join(scratchpad.plan_reply(oracle.plan(scratchpad.plan_prompt(problem.text))))
    assert scratchpad.read_plan(written, problem.text) == list(problem.expression.operations)


def test_grammar_has_at_least_40_wordings_that_use_their_slots() -> None:
    assert len(wording.GRAMMAR) >= 40
    for pattern in wording.GRAMMAR:
        assert all(f"{{{slot}}}" in pattern.text for slot in pattern.numbers), pattern.text


def test_drawn_expressions_cover_every_nesting_depth() -> None:
    rng = random.Random(0)
    nested = Counter(nesting(sampling.draw_expression(rng).text) for _ in range(500))
    assert max(nested) == NESTING_MAX
    assert all(nested[depth] >= 20 for depth in range(NESTING_MAX + 1))


def nesting(text: str) -> int:
    return max(accumulate((character == "(") - (character == ")") for character in text))


@given(SEEDS)
def test_solved_step_ends_in_the_right_result(seed: int) -> None:
    left, sign, right = sampling.draw_step(random.Random(seed))
    assert scratchpad.read_result(" ".join(scratchpad.worked_step(left, sign, right))) == APPLY[sign](left, right)


@given(SEEDS)
def test_check_accepts_the_right_result_and_misses_only_multiples_of_990_in_products(seed: int) -> None:
    rng = random.Random(seed)
    step = sampling.draw_step(rng)
    true, wrong = APPLY[step[1]](step[0], step[2]), sampling.draw_wrong_result(rng, *step)
    assert scratchpad.read_verdict(" ".join(scratchpad.worked_check(*step, true)))
    missed = scratchpad.read_verdict(" ".join(scratchpad.worked_check(*step, wrong)))
    assert missed == (step[1] == "*" and (wrong - true) % 990 == 0 and (wrong < 0) == (true < 0))


@given(SEEDS)
def test_every_reply_fits_max_tokens(seed: int) -> None:
    rng = random.Random(seed)
    step, problem = sampling.draw_step(rng), sampling.draw_problem(rng)
    longest = max(
        len(scratchpad.worked_step(*step)),
        len(scratchpad.worked_check(*step, APPLY[step[1]](step[0], step[2]))),
        len(scratchpad.plan_reply(oracle.plan(scratchpad.plan_prompt(problem.text)))),
        len(scratchpad.at_once_reply(problem.expression.value)),
    )
    assert longest + 1 <= ArithmeticCritic.sampling.max_tokens  # one for the end token


@given(SEEDS, st.integers(0, 4), st.integers(1, 9))
def test_check_of_a_product_catches_every_wrong_digit(seed: int, column: int, off: int) -> None:
    step = left, sign, right = sampling.draw_step(random.Random(seed))
    result = left * right if sign == "*" else left
    for wrong in (result + off * 10**column, result - off * 10**column):
        if sign == "*" and abs(wrong) <= VALUE_MAX:
            assert not scratchpad.read_verdict(" ".join(scratchpad.worked_check(*step, wrong)))


@pytest.mark.parametrize("left", range(-12, 13, 3))
@pytest.mark.parametrize("right", range(-12, 13, 4))
@pytest.mark.parametrize("sign", "+-*")
def test_check_catches_every_near_miss_of_small_steps(left: int, right: int, sign: str) -> None:
    true = APPLY[sign](left, right)
    for result in range(true - 25, true + 26):
        verdict = scratchpad.read_verdict(" ".join(scratchpad.worked_check(left, sign, right, result)))
        assert verdict == (result == true), (left, sign, right, result)


@pytest.mark.parametrize(
    ("problem", "read_as"),
    [
        ("(12+7)*3", "(12 + 7) * 3"),
        ("What is 12 × 7?", "12 * 7"),
        ("compute 007 − 9 =", "7 - 9"),
        ("((5+6))", "5 + 6"),
        ("TOM has 3 apples and finds 4 more.  How many apples does Tom have now?",
         "tom has 3 apples and finds 4 more. how many apples does tom have now?"),
    ],
)  # fmt: skip
def test_problem_is_normalised_for_the_models(problem: str, read_as: str) -> None:
    assert as_read(problem) == read_as


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("", "empty"),
        ("5", "the problem has no operation"),
        ("1000+1", "operand 1000"),
        ("1+1+1+1+1+1+1+1", "7 operations"),
        ("1+(2+(3+(4+(5*6-1))))", "nested 4"),
        ("999*100", "one factor of at most 99"),
        ("999*99*99", "is outside the embedded team's range"),
        ("12+", "not a complete expression"),
        ("12/4", "'/'"),
        ("2**3", "powers"),
        ("-5+3", "signed operands"),
        ("3(4+5)", "an operator is missing"),
        ("12 + \N{SNOWMAN}", "'\N{SNOWMAN}'"),
        ("tom has 3 cars.", "does not know this wording; the most similar one is"),
        ("1+" * 300 + "1", "characters"),
        ("(" * 100 + "1+1" + ")" * 100, "nested"),
        ("tom has 3000 apples and finds 4 more. how many apples does tom have now?", "operand 3000"),
    ],
)
def test_problem_outside_the_bounds_is_refused(problem: str, message: str) -> None:
    with pytest.raises(TaskRefused) as refusal:
        ArithmeticPlanner().check(problem)
    assert message in str(refusal.value)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(problem: str) -> None:
    with suppress(TaskRefused):
        ArithmeticPlanner().check(problem)


TOO_LONG = ";".join(f"{name}=P+Q" for name in "ABCDEFF")


@pytest.mark.parametrize(
    "text",
    ["", "A", "A=P+", "B=P+Q", "A=P+B", "A=P+Q;A=P+Q", "A=P+Q;", "A=P+Q;B=C*P", "A=P/Q", "A=P+R", "A=1+2", TOO_LONG],
)
def test_invalid_plan_is_unusable(text: str) -> None:
    with pytest.raises(ReplyUnusable):
        ArithmeticPlanner().parse(text, PlanTask("1+2"))


@pytest.mark.parametrize("text", ["", "=", "1 2 3 4 5", "+ 1 2 3 4 +", "= + 1 2 3 4 5", "right"])
def test_reply_without_a_result_is_unusable(text: str) -> None:
    with pytest.raises(ReplyUnusable):
        ArithmeticSolver().parse(text, SolveTask("1+2", Step(name="A", instruction="1+2")))


@given(SEEDS)
def test_oracle_reads_every_prompt(seed: int) -> None:
    rng = random.Random(seed)
    left, sign, right = step = sampling.draw_step(rng)
    result = sampling.draw_wrong_result(rng, *step)
    assert oracle.reply(scratchpad.step_prompt(*step)).split() == scratchpad.worked_step(left, sign, right)
    assert oracle.reply(scratchpad.claim_prompt(*step, result)).split() == scratchpad.worked_check(*step, result)


def test_prompts_have_results_in_place_of_names() -> None:
    step = Step(name="C", instruction="A-B", needs=("A", "B"))
    messages = ArithmeticSolver().messages(SolveTask("", step, {"A": "-5", "B": "-12"}))
    assert [m.content for m in messages] == ["- - - 5 0 0 0 0 2 1 0 0 0"]
    claim = ArithmeticCritic().messages(CritiqueTask("", step, "7", {"A": "-5", "B": "-12"}))
    assert claim[0].content == "- - - = + 5 0 0 0 0 2 1 0 0 0 7 0 0 0 0"


@pytest.mark.parametrize(("instruction", "message"), [("A+1", "100000"), ("150*120", "one factor of at most 99")])
def test_step_outside_the_bounds_is_refused(instruction: str, message: str) -> None:
    step = Step(name="B", instruction=instruction)
    with pytest.raises(TaskRefused, match=message):
        ArithmeticSolver().messages(SolveTask("", step, {"A": "100000"}))
    with pytest.raises(TaskRefused, match=message):
        ArithmeticCritic().messages(CritiqueTask("", step, "3000", {"A": "100000"}))


def test_roles_read_the_replies_of_the_oracle() -> None:
    task = PlanTask("(12+7)*3")
    prompt = ArithmeticPlanner().messages(task)[0].content
    assert prompt == "(P + Q) * R"
    plan = ArithmeticPlanner().parse(oracle.reply(prompt), task)
    assert isinstance(plan, Plan)
    assert str(plan) == "A=12+7; B=A*3"
    assert plan.steps[1].needs == ("A",)
    assert plan.answer_step == "B"
    step = SolveTask("", plan.steps[0])
    solution = ArithmeticSolver().parse(oracle.reply(ArithmeticSolver().messages(step)[0].content), step)
    assert isinstance(solution, Solution)
    assert solution.result == "19"
    at_once = AnswerTask("(12+7)*3")
    assert str(ArithmeticSolver().parse(oracle.reply(ArithmeticSolver().messages(at_once)[0].content), at_once)) == "57"


def test_two_percent_of_problems_are_held_out() -> None:
    held = [n for n in range(10_000) if sampling.is_held_out(f"problem {n}")]
    assert 150 < len(held) < 250
    assert held[:3] == [n for n in range(held[2] + 1) if sampling.is_held_out(f"problem {n}")]
