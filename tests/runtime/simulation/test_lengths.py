"""Lengths are lognormal between their bounds, and the same call has the same length under every policy."""

import math
import statistics

import pytest

from agents.role import Message
from runtime.bench.workload import Lengths
from runtime.engines.request import GenerateRequest
from runtime.simulation.lengths import drawn, mean

LENGTHS = Lengths(prompt=(300, 1500), reply=(100, 400))
draw = drawn(LENGTHS)


def ask(request_id: str, prompt: str = "1+2") -> tuple[int, int]:
    return draw(GenerateRequest(request_id, (Message("user", prompt),), 0.0, 1.0, 16))


def test_lengths_are_lognormal_between_their_bounds() -> None:
    drawn_tokens = [ask(f"static/1/0/{n}/0/9", f"{n}+1") for n in range(4000)]
    for tokens, (low, high) in zip(zip(*drawn_tokens, strict=True), (LENGTHS.prompt, LENGTHS.reply), strict=True):
        assert min(tokens) == low
        assert max(tokens) == high
        assert statistics.fmean(tokens) == pytest.approx(mean((low, high)), rel=0.03)
        assert statistics.median(tokens) == pytest.approx(math.sqrt(low * high), rel=0.03)
        assert sum(token in (low, high) for token in tokens) / 4000 == pytest.approx(0.05, abs=0.015)


def test_policies_get_the_same_lengths() -> None:
    assert ask("static/1/0/7/3/21") == ask("waterfill/1/0/7/3/900")
    assert len({ask(f"static/1/0/7/{call}/21")[1] for call in range(20)}) > 10


def test_equal_prompts_have_equal_lengths() -> None:
    assert ask("static/1/0/7/3/21")[0] == ask("static/1/0/8/1/22")[0]
    assert len({ask("static/1/0/7/3/21", f"{n}+1")[0] for n in range(20)}) > 10


def test_equal_bounds_fix_the_length() -> None:
    fixed = drawn(Lengths(prompt=(5, 5), reply=(7, 7)))
    assert fixed(GenerateRequest("r", (Message("user", "x"),), 0.0, 1.0, 16)) == (5, 7)
    assert mean((5, 5)) == pytest.approx(5)
