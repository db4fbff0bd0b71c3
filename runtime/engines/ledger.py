"""Who holds how much of the device: bytes. Nothing here moves memory; whoever does asks first."""


class Ledger:
    """Claims of engines on a budget. A claim is made before memory is taken, and given up after it was released, so
    that what is physically held is within the budget at every instant."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held: dict[str, int] = {}

    @property
    def free(self) -> int:
        """What no engine has claimed; below zero after the budget was cut, until engines have given back."""
        return self.budget_bytes - sum(self.held.values())

    def claim(self, engine: str, nbytes: int) -> None:
        """Let an engine hold up to `nbytes` in all. Raises OverBudget, and then nothing has changed."""
        more = nbytes - self.held.get(engine, 0)
        if more > max(self.free, 0):
            raise OverBudget(f"{engine} would need {more} bytes more; {max(self.free, 0)} of the budget are free")
        self.held[engine] = nbytes

    def found(self, engine: str, nbytes: int) -> None:
        """Record what an engine holds in fact, be it within the budget or not."""
        self.held[engine] = nbytes


class OverBudget(Exception):
    """A claim goes beyond the budget."""
