"""A step on the emulated device takes its step time, or as long as it computes if that is longer."""

import time
from pathlib import Path

import pytest

from runtime.engines.elastic.emulated_device import EmulatedDevice
from runtime.engines.elastic.fair_lock import FairLock
from runtime.engines.step_time import StepTime


def test_a_step_is_padded_by_its_sequences(tmp_path: Path) -> None:
    device = EmulatedDevice(tmp_path / "lock", StepTime(20, 10))
    for sequences, least_s in ((1, 0.03), (5, 0.07)):
        began_s = time.perf_counter()
        with device.step(sequences):
            pass
        assert time.perf_counter() - began_s >= least_s


def test_a_step_that_computes_longer_is_not_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now_s = iter([100.0, 100.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now_s))
    monkeypatch.setattr(time, "sleep", slept.append)
    with EmulatedDevice(tmp_path / "lock", StepTime(200)).step(1):
        pass
    assert slept == [0.0]


def test_a_step_that_fails_frees_the_device_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a failed step is not padded"))
    held: list[bool] = []
    monkeypatch.setattr(FairLock, "__enter__", lambda lock: held.append(True))
    monkeypatch.setattr(FairLock, "__exit__", lambda lock, *exc: held.append(False))
    with pytest.raises(ValueError, match="bad step"), EmulatedDevice(tmp_path / "lock", StepTime(1000)).step(1):
        raise ValueError("bad step")
    assert held == [True, False]
