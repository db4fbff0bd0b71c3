"""Word problems: a grammar of wordings, each with the expression that it asks for.

In a wording, {a} to {g} are whole numbers. {name} and the other slots take a word from WORDS; a slot that recurs takes
the same word. [x|y] is a choice. The same wordings make the training data and recognise problems, so that a problem
which the planner never learnt to read is refused and not guessed at.
"""

import difflib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from agents.arithmetic.expressions import NUMBER_NAMES, OutOfBounds

WORDS: Mapping[str, tuple[str, ...]] = {
    "name": ("tom", "anna", "ben", "mia", "omar", "lina", "noah", "eva", "ivan", "zoe", "raj", "kim"),
    "other": ("sam", "nora", "leo", "ada", "hugo", "ines", "karl", "maya", "theo", "ruth", "ali", "june"),
    "thing": (
        "apples", "books", "coins", "pens", "eggs", "stamps", "cards", "shells", "marbles", "oranges",
        "stickers", "candles", "buttons", "cookies", "tickets", "pencils", "plums", "toys", "bricks", "beads",
    ),
    "box": ("boxes", "bags", "crates", "baskets", "trays", "packs", "jars", "shelves"),
    "place": ("shop", "school", "library", "farm", "bakery", "museum", "market", "factory"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday"),
}  # fmt: skip

WORDINGS: tuple[tuple[str, str], ...] = (
    # one operation
    ("{name} has {a} {thing} and [buys|finds|gets] {b} more. how many {thing} does {name} have [now|in all]?", "a+b"),
    ("{name} has {a} {thing} and [gives|sells] {b} of them to {other}. how many {thing} does {name} have left?", "a-b"),
    ("there are {a} {box} with {b} {thing} in each. how many {thing} are there [in all|altogether]?", "a*b"),
    ("{name} has {a} {thing}. {other} has {b} {thing}. how many {thing} do they have together?", "a+b"),
    ("{name} has {a} {thing}. {other} has {b} {thing}. how many more {thing} does {name} have than {other}?", "a-b"),
    ("the {place} [sells|makes] {a} {thing} every day. how many {thing} is that in {b} days?", "a*b"),
    ("a {place} had {a} visitors on {day} and {b} visitors on the next day. how many visitors came in all?", "a+b"),
    ("it was {a} degrees in the morning and fell by {b} degrees. how many degrees was it then?", "a-b"),
    ("one ticket costs {a} dollars. how many dollars do {b} tickets cost?", "a*b"),
    ("a rope is {a} meters long. {b} meters are cut off. how many meters are left?", "a-b"),
    ("a rectangle is {a} meters long and {b} meters wide. what is its area?", "a*b"),
    # two operations
    ("{name} has {a} {thing}, [buys|finds] {b} more and [loses|sells] {c}. how many {thing} are left?", "a+b-c"),
    ("{name} has {a} {box} of {b} {thing} and {c} loose {thing}. how many {thing} does {name} have?", "a*b+c"),
    ("{name} buys {a} {box} of {b} {thing} and gives away {c} {thing}. how many {thing} are left?", "a*b-c"),
    ("{name} has {a} {thing} and {other} has {b}. they put them together {c} times. how many is that?", "(a+b)*c"),
    ("a bus carries {a} people. {b} get off and {c} get on. how many people are on the bus now?", "a-b+c"),
    ("{name} had {a} dollars and spent {b} dollars on food and {c} dollars on {thing}. how many are left?", "a-b-c"),
    ("the {place} has {a} rows of {b} seats. {c} seats are taken. how many seats are free?", "a*b-c"),
    ("{name} reads {a} pages on {day} and {b} pages on each of the next {c} days. how many pages is that?", "a+b*c"),
    ("a rectangle is {a} meters long and {b} meters wide. what is the length of {c} times both sides?", "(a+b)*c"),
    ("{name}, {other} and a friend have {a}, {b} and {c} {thing}. how many {thing} do the three have?", "a+b+c"),
    ("a tank holds {a} liters. {b} buckets of {c} liters are taken out. how many liters are left?", "a-b*c"),
    ("there are {a} {box} with {b} {thing} each, and every one of {c} rooms has as many. how many in all?", "a*b*c"),
    # three operations
    ("{name} buys {a} {thing} at {b} dollars each and {c} {thing} at {d} dollars each. what is the cost?", "a*b+c*d"),
    ("{name} pays for {a} {thing} at {b} dollars each with {c} dollars and {d} coupons. what is left?", "c+d-a*b"),
    ("a {place} has {a} {thing}, gets {b} more, sells {c} and throws away {d}. how many are left?", "a+b-c-d"),
    ("{name} fills {a} {box} with {b} {thing} each, then {c} are lost and {d} are found. how many now?", "a*b-c+d"),
    ("each of {a} workers at the {place} makes {b} {thing} before noon and {c} after. {d} are broken. "
     "how many are good?",
     "a*(b+c)-d"),
    ("{name} has {a} {thing} more than {b} and {other} has {c} less than {d}. how many do they have?", "a+b+(d-c)"),
    ("there are {a} red, {b} blue, {c} green and {d} white {thing}. how many {thing} are there?", "a+b+c+d"),
    ("from {a} {thing} the {place} keeps {b}. the rest are packed {c} times over, and {d} are added. how many is that?",
     "(a-b)*c+d"),
    ("{name} saves {a} dollars a week for {b} weeks and {other} saves {c} dollars a week for {d} weeks. "
     "how many more dollars does {name} save?", "a*b-c*d"),
    # four operations
    ("{name} buys {a} {box} of {b} {thing} and {c} {box} of {d} {thing}, and eats {e}. how many {thing} are left?",
     "a*b+c*d-e"),
    ("the {place} had {a} visitors on {day}, then {b}, {c}, {d} and {e} on the days after. how many is that in all?",
     "a+b+c+d+e"),
    ("{name} has {a} dollars, earns {b}, spends {c}, earns {d} and spends {e}. how many dollars are left?",
     "a+b-c+d-e"),
    ("{a} classes of {b} girls and {c} boys go to the {place} with {d} teachers. {e} stay home. how many go?",
     "a*(b+c)+d-e"),
    ("a train has {a} cars with {b} seats and {c} cars with {d} seats. {e} people ride. how many seats are free?",
     "a*b+c*d-e"),
    ("{name} and {other} have {a} and {b} {thing}. both sums are put in {c} {box}, and {d} times {e} are taken. "
     "how many are left?", "(a+b)*c-d*e"),
    # five and six operations
    ("{name} buys {a} {thing} at {b} dollars, {c} pens at {d} dollars and {e} caps at {f} dollars. what is the cost?",
     "a*b+c*d+e*f"),
    ("a bus starts with {a} people. at the first stop {b} get on and {c} get off, at the second {d} get on and {e} "
     "get off, at the last {f} get off. how many are on the bus?", "a+b-c+d-e-f"),
    ("the {place} sells {a} {thing} at {b} dollars and {c} at {d} dollars, and pays {e} dollars for rent and {f} for "
     "light. what does it earn?", "a*b+c*d-e-f"),
    ("{name} counts {a}, {b}, {c}, {d}, {e}, {f} and {g} {thing} in seven {box}. how many {thing} is that?",
     "a+b+c+d+e+f+g"),
    ("{name} buys {a} {thing} at {b} dollars, {c} pens at {d} dollars and {e} caps at {f} dollars, and pays with {g} "
     "dollars. how many dollars are left?", "g-(a*b+c*d+e*f)"),
    ("{a} crews of {b} men and {c} women work {d} hours each. {e} crews of {f} people work {g} hours each. "
     "how many more hours do the first work?", "a*(b+c)*d-e*f*g"),
)  # fmt: skip

_SLOT = re.compile(r"\{(\w+)\}|\[([^\]]+)\]")


@dataclass(frozen=True)
class Wording:
    """A wording of the grammar, and the expression over its number slots that it asks for."""

    text: str
    expression: str

    @property
    def numbers(self) -> tuple[str, ...]:
        """The number slots, sorted by name."""
        return tuple(sorted(set(re.findall(r"[a-g]", self.expression))))

    def write(self, rng: random.Random, values: Mapping[str, int]) -> str:
        """Return a problem in this wording, with `values` in its number slots and random words in the others."""
        chosen = {slot: rng.choice(words) for slot, words in WORDS.items()}

        def fill(match: re.Match[str]) -> str:
            slot, choices = match.groups()
            if choices:
                return str(rng.choice(choices.split("|")))
            return str(values[slot]) if slot in values else chosen[slot]

        return _SLOT.sub(fill, self.text)

    def fill(self, values: Mapping[str, object]) -> str:
        """Return the expression with numbers, or names of numbers, in its slots."""
        return re.sub(r"[a-g]", lambda m: str(values[m[0]]), self.expression)


GRAMMAR = tuple(Wording(*pair) for pair in WORDINGS)


def tidy(text: str) -> str:
    """Return the text as the models read it: lower case, single blanks, no leading zeros."""
    return re.sub(r"\b0+(?=\d)", "", " ".join(text.lower().split()))


def recognise(text: str) -> str:
    """Return the expression that a word problem asks for. Raise OutOfBounds, naming the most similar known wording."""
    wording, match = _match(text)
    return wording.fill({slot: match[slot] for slot in wording.numbers})


def recognise_named(text: str) -> str:
    """Return that expression over names of the numbers, which are named in the order of the text."""
    wording, match = _match(text)
    ordered = sorted(wording.numbers, key=match.start)
    return wording.fill(dict(zip(ordered, NUMBER_NAMES, strict=False)))


def _match(text: str) -> tuple[Wording, re.Match[str]]:
    problem = tidy(text)
    for wording, pattern in _patterns():
        if match := pattern.fullmatch(problem):
            return wording, match
    raise OutOfBounds(f"the embedded team does not know this wording; the most similar one is {_closest(problem)!r}")


@cache
def vocabulary() -> frozenset[str]:
    """Return every word that occurs in a problem of the grammar."""
    text = " ".join(w.text for w in GRAMMAR)
    words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text))
    return frozenset(words).union(*WORDS.values())


@cache
def _patterns() -> tuple[tuple[Wording, re.Pattern[str]], ...]:
    return tuple((wording, re.compile(_pattern(wording.text))) for wording in GRAMMAR)


def _pattern(text: str) -> str:
    parts, end, seen = [], 0, set()
    for match in _SLOT.finditer(text):
        parts.append(re.escape(text[end : match.start()]))
        slot, choices = match.groups()
        if choices:
            parts.append(f"(?:{choices})")
        elif slot in seen:
            parts.append(f"(?P={slot})")
        else:
            seen.add(slot)
            parts.append(f"(?P<{slot}>{'|'.join(WORDS[slot]) if slot in WORDS else '[0-9]+'})")
        end = match.end()
    return "".join(parts) + re.escape(text[end:])


def _closest(problem: str) -> str:
    examples = [w.write(random.Random(0), dict.fromkeys(w.numbers, 12)) for w in GRAMMAR]
    return max(examples, key=lambda e: difflib.SequenceMatcher(None, problem, e, autojunk=False).ratio())
