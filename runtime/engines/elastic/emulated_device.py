"""An emulated device: engines of several processes take turns on it, step by step, as they do on one GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.engines.elastic.fair_lock import FairLock
from runtime.engines.step_time import StepTime


class EmulatedDevice:
    """A device that one engine at a time uses, for at least its step time. `lock` is the file that all engines share.

    A step that computes longer than its step time holds the device until it has ended.
    """

    def __init__(self, lock: Path, step_time: StepTime) -> None:
        self._lock = FairLock(lock)
        self._step_time = step_time

    @contextmanager
    def step(self, sequences: int) -> Iterator[None]:
        """Wait for the device, and hold it until the step has ended and its step time has passed."""
        with self._lock:
            end_s = time.perf_counter() + self._step_time.seconds(sequences)
            yield
            time.sleep(max(0.0, end_s - time.perf_counter()))
