r"""Reads numbers in texts: the number that a text consists of, and the number that a text gives as its answer.

Numbers are read exactly, without rounding:

- Commas, blanks, apostrophes and underscores group thousands: 26,905 and 26 905 are 26905.
- A point is a decimal point: 26.905 is less than 27. Points before two or more groups of three digits group thousands:
  1.234.567.
- A comma that cannot group thousands is a decimal comma: 0,5 and 12,75 and 26.905,00. A comma before three digits
  groups if it can, so 26,905 never means 26.905.
- Signs, fractions (1/2, 2 1/2, ½, \frac{1}{2}), powers of ten (2.6905e4, 2.6905 × 10^4) and percent signs count.
- Currency signs before a number and units after it do not count.
- These are not numbers: digits in names (H2O), other powers and exponents (2^10, cm²), multiples of π and of roots,
  dates (3/4/2025), and lists without blanks (1,2,3).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

DIGITS_MAX = 1000
"""Longest number and largest power of ten that are read. Python refuses to read much longer numbers."""


@dataclass(frozen=True)
class Quantity:
    """A number in a text: its value, and whether a percent sign follows it.

    `start` and `stop` are its place in the text after the text's notation was made plain.
    """

    value: Fraction
    is_percent: bool = False
    start: int = 0
    stop: int = 0

    def equals(self, other: "Quantity") -> bool:
        """Return True if the two can mean the same number.

        50% equals 50, because GSM8K and MATH leave out the percent sign, and it equals its value 0.5. Two percentages
        are equal only if their numbers are.
        """
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percent, number = (self, other) if self.is_percent else (other, self)
        return number.value in (percent.value, percent.value / 100)


def whole(text: str) -> Quantity | None:
    r"""Return the number that a text consists of, or None.

    Blanks, currency and dollar signs, bold, \boxed and a final full stop do not count.
    """
    plain = _plain(_boxed(text) or text).lstrip(" \n$*").rstrip(" \n$*.€£¥₹")
    found = next(_quantities(plain), None)
    return found if found is not None and (found.start, found.stop) == (0, len(plain)) else None


def final(text: str) -> Quantity | None:
    r"""Return the number that a text gives as its answer, or None.

    It is in the first of these places that the text has:

    1. The last \boxed{...}, which is the form of the MATH data set. If that holds no number, there is none.
    2. The last line, if that is `####` and a number. This is the form of GSM8K's solutions, and the filter
       `strict-match` of lm-evaluation-harness.
    3. The last sentence in which a number directly follows "answer is", "answer:" or "answer =".
    4. The last sentence or line with a number, as in the filter `flexible-extract` of lm-evaluation-harness.

    There, it is the number after the last equals sign. Without an equals sign it is the first number in places 1 to 3,
    and the last number in place 4.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return _answer_in(_plain(boxed))
    plain = _ANSWER.sub("answer is ", _plain(text))
    last_line = plain.rstrip().rpartition("\n")[2]
    if last_line.startswith("####") and (number := _directly_in(last_line[4:])):
        return number
    sentences = [sentence for sentence in _SENTENCE_END.split(plain) if _DIGIT.search(sentence)]
    for sentence in reversed(sentences):
        _, marker, rest = sentence.rpartition("answer is ")
        if marker and (number := _directly_in(rest)):
            return number
    return next((number for sentence in reversed(sentences) if (number := _last_in(sentence))), None)


_ANSWER = re.compile(r"\banswer[ *_`]{0,9}(?:is\b|[:=])[\s*_`:=]{0,9}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|\Z)")
_DIGIT = re.compile(r"[0-9]")
_LETTER = re.compile(r"[^\W0-9_]")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_FRACTION_SIGN = re.compile("([0-9]?)([¼-¾⅐-⅞])")
_LATEX_FRACTION = re.compile(r"([0-9]?)\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|([0-9])([0-9]))")
_LATEX_BLANK = re.compile(r"\\[,;: ]|~|\t")
_NOTATION = {
    **dict.fromkeys("−–﹣－", "-"),
    **dict.fromkeys("’ʼ", "'"),
    "⁄": "/",
}
_LATEX = {"\\$": "$", "\\%": "%", "\\!": "", "{,}": ",", "\\times": "×", "\\cdot": "×", "\\sqrt{": "√", "\\pi": "π"}

# The quantifiers are possessive and bounded, so that reading takes time linear in the text.
_DIGITS = r"""(?:
    [1-9][0-9]{0,2} (?:[ ][0-9]{3}(?![0-9])){1,20}+ (?:[.,][0-9]++)?
  | [0-9][0-9.,'_]*+
  | \.[0-9]++
)"""
_QUANTITY = re.compile(
    rf"""
    (?<![\w^.√]) (?<![_^]\{{) (?<![0-9]\*\*) (?<![0-9][,']) (?<![0-9]/) (?<![0-9][ ]/[ ])
    (?: (?<![)\]}}]) (?P<sign>[-+]) )? (?:[$€£¥₹][ ]?)? (?P<inner_sign>[-+])?
    (?P<number>{_DIGITS})
    (?: [ ]?/[ ]?(?P<below>{_DIGITS}) | [ ]{{1,3}}(?P<above>[0-9]{{1,9}}+)/(?P<mixed_below>[0-9]{{1,9}}+) )?+
    (?: [eE](?P<exponent>[-+]?[0-9]{{1,9}}+)(?!\w) | [ ]?[×x*][ ]?10(?:\^|\*\*)\{{?(?P<power>[-+]?[0-9]{{1,9}}+)\}}? )?+
    (?! [ ]?[\^√π] | \*\*[0-9] | [ ]?/[ ]?[0-9] )
    (?P<percent> [ ]?(?:%|per[ ]?cent\b) )?
    """,
    re.VERBOSE,
)
_WITH_POINT = re.compile(r"([1-9][0-9]{0,2}(?:([ ,'_])[0-9]{3})(?:\2[0-9]{3})*|[0-9]*)(?:\.([0-9]+))?")
_WITH_COMMA = re.compile(r"([1-9][0-9]{0,2}(?:([ .'])[0-9]{3})(?:\2[0-9]{3})*|[0-9]+)(?:,([0-9]+))?")


def _plain(text: str) -> str:
    """Return a text with one notation for each sign: ASCII digits and signs, no LaTeX for fractions and blanks."""
    text = _SUPERSCRIPTS.sub(lambda match: f"^{match[0]}", text)
    text = _FRACTION_SIGN.sub(lambda match: f"{match[1]} {match[2]}" if match[1] else match[2], text)
    text = unicodedata.normalize("NFKC", text)
    for written, plain in (_NOTATION | _LATEX).items():
        text = text.replace(written, plain)
    return _LATEX_FRACTION.sub(_plain_fraction, _LATEX_BLANK.sub(" ", text))


def _plain_fraction(match: re.Match[str]) -> str:
    whole, above, below, digit_above, digit_below = match.groups()
    return f"{whole} " * bool(whole) + f"{above or digit_above}/{below or digit_below}"


def _boxed(text: str) -> str | None:
    r"""Return what the last \boxed{...} holds, or None."""
    _, command, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if command else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return None


def _directly_in(text: str) -> Quantity | None:
    """Return the number that a text gives, if no word comes before its first number."""
    first = next(_quantities(text), None)
    return _answer_in(text) if first is not None and not _LETTER.search(text[: first.start]) else None


def _answer_in(text: str) -> Quantity | None:
    """Return the first number, or the result if an equation starts there: 20000 + 6905 = 26905."""
    numbers = list(_quantities(text))
    if not numbers:
        return None
    equals = _last_equals(text, numbers)
    is_equation = not _LETTER.search(text[numbers[0].start : max(equals, 0)])
    return _after(equals, numbers) if is_equation else numbers[0]


def _last_in(text: str) -> Quantity | None:
    """Return the number after the last equals sign that has one, or the last number if there is no such sign."""
    numbers = list(_quantities(text))
    if not numbers:
        return None
    equals = _last_equals(text, numbers)
    return _after(equals, numbers) if equals >= 0 else numbers[-1]


def _last_equals(text: str, numbers: Sequence[Quantity]) -> int:
    """Return the place of the last equals sign before a number, or -1."""
    return text.rfind("=", 0, numbers[-1].start)


def _after(place: int, numbers: Sequence[Quantity]) -> Quantity:
    return next(number for number in numbers if number.start > place)


def _quantities(text: str) -> Iterator[Quantity]:
    """Yield the numbers in a plain text, in order."""
    for match in _QUANTITY.finditer(text):
        value = _value(match)
        if value is not None:
            yield Quantity(value, match["percent"] is not None, match.start(), match.end())


def _value(match: re.Match[str]) -> Fraction | None:
    value = _decimal(match["number"])
    power = int(match["exponent"] or match["power"] or 0)
    below = _decimal(match["below"] or match["mixed_below"] or "1")
    if value is None or not below or abs(power) > DIGITS_MAX:
        return None
    value = value + Fraction(int(match["above"])) / below if match["above"] else value / below
    value *= Fraction(10) ** power
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _decimal(digits: str) -> Fraction | None:
    """Return the value of digits with points, commas and other separators, or None if they are not one number."""
    digits = digits.rstrip(".,'_")
    match = _WITH_POINT.fullmatch(digits) or _WITH_COMMA.fullmatch(digits)
    if match is None or len(digits) > DIGITS_MAX:
        return None
    integer, separator, decimals = match.groups(default="")
    return Fraction(f"{integer.replace(separator, '') if separator else integer or '0'}.{decimals or '0'}")
