"""`keep`: engines never sleep. The device must hold all of them."""

from runtime.residency.policy import Moves, ResidencyDecision, ResidencyPolicy, least_recently_used
from runtime.residency.snapshot import ResidencySnapshot


class Keep(ResidencyPolicy):
    """A policy that keeps every engine awake."""

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        moves = Moves(snapshot, least_recently_used)
        for engine in snapshot.residences:
            if engine.sleeps:
                moves.wake(engine, "every engine stays awake")
        return moves.decision
