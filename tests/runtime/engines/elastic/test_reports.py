"""Tests that reports survive vLLM's encoding on their way from the engine core to its client."""

from typing import Any

import pytest
from pydantic import ValidationError
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from runtime.engines.elastic.reports import (
    ResizeApplied,
    ResizeDeferred,
    ResizeRefused,
    ResizeReport,
    ResizeSuperseded,
    parse_limits,
    parse_report,
)
from runtime.engines.grant import EngineLimits


def received(result: object) -> Any:
    """Return what vLLM's client receives if a utility call in the engine core returns `result`."""
    outputs = EngineCoreOutputs(utility_output=UtilityOutput(call_id=1, result=UtilityResult(result)))
    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs)).utility_output.result.result


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize(
    "report",
    [
        ResizeApplied(kv_cache_bytes=1 << 40, moved_bytes=2, seconds=0.3, stall_seconds=0.1, preempted=4),
        ResizeDeferred(kv_cache_bytes=1, held_bytes=2),
        ResizeRefused("out of memory"),
        ResizeSuperseded(),
    ],
    ids=lambda report: report.state,
)
def test_report_is_received_as_sent(report: ResizeReport, insecure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", str(int(insecure)))
    assert parse_report(received(report)) == report


@pytest.mark.parametrize("insecure", [False, True])
def test_limits_are_received_as_sent(insecure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", str(int(insecure)))
    limits = EngineLimits(1 << 40, 2, 3, 4, 5, 6, 7, 8, 9, ("10111213-1415-1617-1819-1a1b1c1d1e1f", "2"))
    assert parse_limits(received(limits)) == limits


def test_report_of_an_unknown_state_is_rejected() -> None:
    with pytest.raises(ValidationError, match="'applied', 'deferred', 'refused', 'superseded'"):
        parse_report({"state": "unknown"})
