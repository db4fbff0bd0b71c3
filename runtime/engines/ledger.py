"""The account of one device's memory: how many bytes each engine has claimed.

The ledger moves no memory. Whoever moves memory claims it here first.
"""

from collections.abc import Mapping
from types import MappingProxyType


class Ledger:
    """The engines' claims on the memory budget of one device.

    An engine claims memory before it takes any, and lowers its claim only after it has released memory. The sum of
    the claims is therefore never less than what the engines physically hold, and a claim within the budget keeps the
    device within the budget.

    `budget_bytes` is what they may claim now. `full_budget_bytes` is what they may claim while no other process takes
    memory of the device.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.set_full_budget(budget_bytes)
        self._held: dict[str, int] = {}
        self._total = 0  # kept rather than summed: one decision reads `free` several times for each engine

    def set_full_budget(self, budget_bytes: int) -> None:
        """Set the full budget, of which no other process is known to take a part."""
        self.budget_bytes = self.full_budget_bytes = budget_bytes

    @property
    def held(self) -> Mapping[str, int]:
        """Each engine's claim in bytes."""
        return MappingProxyType(self._held)

    @property
    def free(self) -> int:
        """The unclaimed bytes of the budget. Negative if the budget was cut and engines have yet to shrink."""
        return self.budget_bytes - self._total

    def claim(self, engine: str, nbytes: int) -> None:
        """Set an engine's claim to `nbytes`. Raise OverBudget, and change nothing, if the budget has no room for it."""
        more, free = nbytes - self._held.get(engine, 0), max(self.free, 0)
        if more > free:
            raise OverBudget(f"engine {engine} needs {more} more bytes; only {free} of the budget are free")
        self.record(engine, nbytes)

    def record(self, engine: str, nbytes: int) -> None:
        """Set an engine's claim to what it already holds, even if that exceeds the budget."""
        self._total += nbytes - self._held.get(engine, 0)
        self._held[engine] = nbytes


class OverBudget(Exception):
    """A claim exceeds the budget."""
