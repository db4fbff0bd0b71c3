"""`lru`: engines stay awake until another one needs their memory. Then the least recently called one leaves."""

from runtime.residency.policy import Moves, ResidencyDecision, ResidencyPolicy, least_recently_used
from runtime.residency.snapshot import ResidencySnapshot


class Lru(ResidencyPolicy):
    """A policy that lets the least recently called engine sleep if another one needs its memory."""

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        moves = Moves(snapshot, least_recently_used)
        moves.wake_for_calls()
        return moves.decision
