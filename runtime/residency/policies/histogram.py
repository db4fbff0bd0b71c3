"""`histogram`: engines sleep and wake by how long they were idle before.

An engine whose calls ended sleeps at once if it will probably not be called soon, wakes shortly before the earliest
time at which it was called again before, and stays awake until the latest such time. Until enough idle times are known,
it stays awake for a fixed time. If memory is short, the idle engine that was called least recently leaves first.

Source: M. Shahrad et al., "Serverless in the Wild", USENIX ATC 2020, section 4.2: a head of 5% and a tail of 99%, with
a margin of 10% before and after. There, idle times are counted in bins of a minute, and time series predict those of
rarely used functions. Here, the latest 200 are kept as they are, and rarely used engines stay awake for the fixed time.
"""

from pydantic import Field

from runtime.residency.idle_times import ENOUGH
from runtime.residency.policy import Moves, ResidencyDecision, ResidencyPolicy, least_recently_used
from runtime.residency.snapshot import ResidencySnapshot

HEAD, TAIL, MARGIN = 0.05, 0.99, 0.1


class Histogram(ResidencyPolicy):
    """A policy that predicts from an engine's idle times when it will be called."""

    class Options(ResidencyPolicy.Options):
        """Options of `histogram`."""

        idle_s: float = Field(
            default=300,
            ge=0,
            allow_inf_nan=False,
            description="Seconds for which an engine stays awake without calls while too few idle times are known.",
        )

    options: Options

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        moves = Moves(snapshot, least_recently_used)
        moves.wake_for_calls()
        for engine in snapshot.residences:
            earliest_s, latest_s = 0.0, self.options.idle_s
            if len(engine.idle_times) >= ENOUGH:
                earliest_s = (1 - MARGIN) * engine.idle_times.quantile(HEAD) - engine.wake_s
                latest_s = (1 + MARGIN) * engine.idle_times.quantile(TAIL)
            expected = earliest_s <= engine.idle_s < latest_s
            if engine.can_leave and not expected:
                moves.sleep(
                    engine, f"no calls for {engine.idle_s:.1f} s; it was idle {earliest_s:.1f} to {latest_s:.1f} s"
                )
            elif engine.sleeps and not engine.calls and expected and not moves.waits():
                moves.wake(engine, f"no calls for {engine.idle_s:.1f} s, as often before the next one")
        return moves.decision
