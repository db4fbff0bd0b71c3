"""Timings of calls come from the times of their chunks."""

import pytest

from runtime.bench.play import call_row
from runtime.events import CallEnded


def test_call_timings_come_from_its_chunks() -> None:
    row = call_row(CallEnded("j", "solver", "s", 10.0, (10.5, 10.6, 11.0), (1, 1, 4), 7), started_s=4.0)
    assert (row.asked_s, row.ttft_s, row.e2el_s, row.completion_tokens) == (6.0, 0.5, 1.0, 6)
    assert row.tpot_s == pytest.approx(0.1)
    assert row.itl_s == pytest.approx((0.1, 0.4))  # one value for each message, however many tokens it carries
    empty = call_row(CallEnded("j", "solver", "s", 10.0, (), (), 0), started_s=4.0)
    assert (empty.ttft_s, empty.tpot_s, empty.itl_s) == (0, 0, ())
