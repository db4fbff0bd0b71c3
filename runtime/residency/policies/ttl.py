"""`ttl`: an engine sleeps after a fixed time without calls, and wakes when it is called.

If memory is short, the idle engine that was called least recently leaves first. This is what Ollama (5 minutes),
llama-swap and kvcached's sleep manager (5 minutes) do.
"""

from pydantic import Field

from runtime.residency.policy import Moves, ResidencyDecision, ResidencyPolicy, least_recently_used
from runtime.residency.snapshot import ResidencySnapshot


class Ttl(ResidencyPolicy):
    """A policy that lets engines sleep after a fixed time without calls."""

    class Options(ResidencyPolicy.Options):
        """Options of `ttl`."""

        idle_s: float = Field(
            default=300, ge=0, allow_inf_nan=False, description="Seconds for which an engine stays awake without calls."
        )

    options: Options

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        moves = Moves(snapshot, least_recently_used)
        for engine in snapshot.residences:
            if engine.can_leave and engine.idle_s >= self.options.idle_s:
                moves.sleep(engine, f"no calls for {engine.idle_s:.1f} s")
        moves.wake_for_calls()
        return moves.decision
