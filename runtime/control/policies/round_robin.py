"""`round_robin`: the whole budget goes to one engine after another."""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


class RoundRobin(Policy):
    """A policy that gives one engine after another all memory that can move; the others keep their floors."""

    class Options(Value):
        """Options of `round_robin`."""

        turn_s: float = Field(
            default=1.0,
            gt=0,
            allow_inf_nan=False,
            description="Length of a turn in seconds. The default is that of arXiv 2512.22149.",
        )

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        turn = int(snapshot.now_s / self.options.turn_s) % len(views)
        wanted = [0.0] * len(views)
        wanted[turn] = float(snapshot.movable_bytes)

        def reason(index: int) -> str:
            return "its turn" if index == turn else f"{views[turn].name}'s turn"

        return decision(snapshot, fit(snapshot, bound(snapshot, wanted)), reason)
