"""The time of a step on an emulated device: see `elastic/emulated_device.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """The least time that a step of an engine takes: `step_ms`, plus `sequence_ms` for each sequence in the step."""

    step_ms: float
    sequence_ms: float = 0.0

    def seconds(self, sequences: int) -> float:
        """Return the seconds of a step with this number of sequences."""
        return (self.step_ms + self.sequence_ms * sequences) / 1000

    def __str__(self) -> str:
        return f"{self.step_ms:g} ms" + (f" + {self.sequence_ms:g} ms a sequence" if self.sequence_ms else "")
