"""Numbers in texts: how they may be written, and which one of a text is its answer."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.jobs import quantity
from runtime.jobs.quantity import Quantity

FORMS = {
    "26905": "26905",
    "26,905": "26905",
    "26 905": "26905",
    "26\u202f905": "26905",
    "26'905": "26905",
    "26_905": "26905",
    "26{,}905": "26905",
    "26\\,905": "26905",
    "26.905,00": "26905",
    "$26,905.00": "26905",
    "\\$26,905": "26905",
    "$26905$": "26905",
    "26 905,00 €": "26905",
    "**26905**": "26905",
    "26905.": "26905",
    "+26905": "26905",
    "２６９０５": "26905",
    "2.6905e4": "26905",
    "2.6905 × 10^4": "26905",
    "2.6905 × 10⁴": "26905",
    "2.6905 \\times 10^{4}": "26905",
    "\\boxed{26905}": "26905",
    "26.905": "26.905",
    "1.234.567": "1234567",
    "1,234,567.89": "1234567.89",
    "0,5": "0.5",
    "0,500": "0.5",
    "1234,567": "1234.567",
    ".5": "0.5",
    "-.5": "-0.5",
    "3e-2": "0.03",
    "1/2": "0.5",
    "½": "0.5",
    "-½": "-0.5",
    "2½": "2.5",
    "2 1/2": "2.5",
    "\\frac{1}{2}": "0.5",
    "-\\dfrac{1}{2}": "-0.5",
    "2\\frac12": "2.5",
    "1/2.5": "0.4",
    "-5": "-5",
    "\u22125": "-5",
    "\u20135": "-5",
    "-$5": "-5",
    "$-5$": "-5",
}


@pytest.mark.parametrize(("text", "value"), FORMS.items())
def test_a_number_is_read_in_every_form(text: str, value: str) -> None:
    found = quantity.whole(text)
    assert found is not None
    assert (found.value, found.is_percent) == (Fraction(value), False)


NOT_NUMBERS = ["", "Paris", "26905 apples", "5 - 3", "10-5", "x = 5", "2024 500", "1,2,3", "1, 2", "3/4/2025", "H2O"]
NOT_NUMBERS += [
    "2^10",
    "2**10",
    "10^4",
    "2\\pi",
    "2π",
    "\\sqrt{2}",
    "√2",
    "1/0",
    "1e9999999",
    "9" * 1001,
    "nan",
    "12:30",
]
NOT_NUMBERS += ["192.168.0.1", "inf", "3 / 4 / 5"]


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_other_text_is_not_a_number(text: str) -> None:
    assert quantity.whole(text) is None


ANSWERS = {
    "The answer is 26905.": "26905",
    "The answer is 26905 apples for 5 people.": "26905",
    "The answer is:\n\n26905 apples. That is 5 each.": "26905",
    "**Answer:** $26,905.00": "26905",
    "Answer: 26905 (since x = 5)": "26905",
    "The final answer is 20000 + 6905 = 26905, as 5 is 5.": "26905",
    "The answer is 3. No, wait. The answer is 4. I checked 2 times.": "4",
    "She eats 3 a day, so she eats 21 a week.": "21",
    "x = 3 and y = 5. So there are 8 apples.": "8",
    "5 + 3 = 8 apples, for 2 people": "8",
    "First 1, then 2, then 3": "3",
    "10-5": "5",
    "26905 cm²": "26905",
    "26905 m^2": "26905",
    "7 * 8 <<7*8=56>>56 in all.\n#### 56": "56",
    "#### 3. Add the parts\n5 + 4 = 9": "9",
    "#### 26,905\n": "26905",
    "\\boxed{3} is wrong, but \\boxed{x = 26{,}905} is right, by 2 methods": "26905",
    "\\boxed{26905 \\text{ apples}}": "26905",
    "\\boxed{\\frac{1}{2}}, which is 0.50 of 1": "0.5",
    "about 5 percent": "5",
}


@pytest.mark.parametrize(("text", "value"), ANSWERS.items())
def test_the_answer_is_taken_from_a_text_with_several_numbers(text: str, value: str) -> None:
    found = quantity.final(text)
    assert found is not None
    assert found.value == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "H2O", "\\boxed{x + y}, for all 5", "\\boxed{2\\pi}", "2^10", "3/4/2025"])
def test_a_text_without_an_answer_has_none(text: str) -> None:
    assert quantity.final(text) is None


def test_a_percentage_equals_its_number_and_its_value() -> None:
    fifty = Quantity(Fraction(50), is_percent=True)
    assert fifty.equals(Quantity(Fraction(50)))
    assert Quantity(Fraction(1, 2)).equals(fifty)
    assert not fifty.equals(Quantity(Fraction(5)))
    assert not fifty.equals(Quantity(Fraction(1, 2), is_percent=True))
    assert not Quantity(Fraction(50)).equals(Quantity(Fraction(1, 2)))


DECIMALS = st.decimals(min_value=-(10**15), max_value=10**15, places=3, allow_nan=False, allow_infinity=False)
SENTENCES = [
    "{}",
    "The answer is {}.",
    "So 3 * 4 = {} apples",
    "It is {}, I think",
    "**{}**",
    "\\boxed{{{}}}",
    "5\n#### {}",
]


def written(value: Decimal, group: str) -> str:
    """Return a number whose thousands are grouped."""
    return f"{value:,f}".replace(",", group)


@given(DECIMALS, st.sampled_from([",", " ", "_", "'", "\u00a0", ""]), st.sampled_from(SENTENCES))
def test_a_number_in_a_sentence_is_read_back(value: Decimal, group: str, sentence: str) -> None:
    found = quantity.final(sentence.format(written(value, group)))
    assert found is not None
    assert found.value == Fraction(value)


@given(DECIMALS, st.sampled_from([".", " "]))
def test_a_european_number_is_read_back(value: Decimal, group: str) -> None:
    european = f"{value:,.2f}".replace(".", ";").replace(",", group).replace(";", ",")
    found = quantity.whole(european)
    assert found is not None
    assert found.value == Fraction(f"{value:.2f}")


@given(st.text(), st.text())
def test_any_text_can_be_read(before: str, after: str) -> None:
    for text in (before, f"{before}\\boxed{{{after}", f"{before}answer is{after}"):
        quantity.whole(text)
        quantity.final(text)
