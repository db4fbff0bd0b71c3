"""Who holds how much of the device: bytes. Nothing here moves memory; whoever does asks first."""

from collections.abc import Mapping
from types import MappingProxyType


class Ledger:
    """Claims of engines on a budget. A claim is made before memory is taken, and given up after it was released, so
    that what is physically held is within the budget at every instant."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[str, int] = {}
        self._total = 0  # kept, not summed: a decision asks for what is free several times for each of its engines

    @property
    def held(self) -> Mapping[str, int]:
        """Bytes that each engine has claimed."""
        return MappingProxyType(self._held)

    @property
    def free(self) -> int:
        """What no engine has claimed; below zero after the budget was cut, until engines have given back."""
        return self.budget_bytes - self._total

    def claim(self, engine: str, nbytes: int) -> None:
        """Let an engine hold up to `nbytes` in all. Raises OverBudget, and then nothing has changed."""
        more = nbytes - self._held.get(engine, 0)
        if more > max(self.free, 0):
            raise OverBudget(f"{engine} would need {more} bytes more; {max(self.free, 0)} of the budget are free")
        self.record(engine, nbytes)

    def record(self, engine: str, nbytes: int) -> None:
        """Note what an engine holds in fact, be it within the budget or not."""
        self._total += nbytes - self._held.get(engine, 0)
        self._held[engine] = nbytes


class OverBudget(Exception):
    """A claim goes beyond the budget."""
