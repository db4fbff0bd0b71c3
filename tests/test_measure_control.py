"""scripts/measure_control.py measures every part of a tick of every policy."""

from typing import Any

import pytest

from runtime.control import catalogue
from scripts import measure_control


async def test_measure_records_every_part_for_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    record: dict[str, Any] = {"moves": {}, "still": {}}
    await measure_control.measure(3, 1, record)
    for policies in record.values():
        assert set(policies) == set(catalogue.names())
        for figures in policies.values():
            assert set(figures) == {"whole", "moved", *measure_control.PARTS}
            assert figures["whole"]["3"] > 0
    assert record["moves"]["static"]["moved"]["3"] > 0
    assert record["still"]["static"]["moved"]["3"] == 0


def test_slope_of_linear_times_is_1() -> None:
    assert measure_control.slope({"3": 1.0, "10": 100.0, "100": 1000.0, "1000": 10_000.0}) == 1
