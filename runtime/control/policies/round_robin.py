"""`round_robin`: the whole budget to one engine after another."""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


class RoundRobin(Policy):
    """Turns of `turn_s` seconds (the paper's are 1 s); who is not at turn keeps its floor."""

    class Options(Value):
        """How long a turn is: seconds."""

        turn_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        turn = int(snapshot.now_s / self.options.turn_s) % len(views)
        wanted = [0.0] * len(views)
        wanted[turn] = float(snapshot.movable_bytes)
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(
            snapshot, sizes, lambda place: "its turn" if place == turn else f"the turn is {views[turn].name}'s"
        )
