"""`turns`, the default: serve engines in turns where that finishes more work, and divide memory as `waterfill` does.

A step of an engine with n sequences takes a + b n seconds: `a` is the price of the step, mostly that of reading the
weights, and `b` that of a sequence. A device serves L engines at once at full speed; L is its number of lanes. A round
in which each engine of a set S makes one step takes

    T(S) = max(sum over S of (a + b n) / L, the longest a + b n in S).

Scarce memory holds a certain number of sequences. If three engines share it, each round pays three times `a` for them.
If one engine has all of it, each round pays `a` once. So it can pay to admit requests to some engines only. The others'
running requests finish and leave their memory, and the set changes as queues change. With a large `a` and one lane, as
on a GPU, turns are nearly twice as fast for a team of three. With almost as many lanes as engines, as on CPU cores,
they gain nothing.

The policy admits the set with the greatest value

    V(S) = (sum over S of w n) / T(S),

where n is the number of sequences that fit into the memory that is free for S, shared max-min fairly. The weight w is
the number of the engine's requests in flight, divided by its priority. V is the rate at which S works off the queues,
and long queues count most. This is the max-weight rule. T counts the prompt tokens that come with n sequences, too.

- The policy admits all engines while memory is enough for all, and unless the best set is `gain` times as good as all.
- A set stays until another is `stay` times as good, because a change costs time.
- When the turn of an engine ends, its running requests finish beside the engines whose turn it is, or they are
  preempted: see below.
- The controller ends a pause after 30 s, so that no engine starves.
- The weight of an engine with an objective for a job, a call or its first token grows up to tenfold while a request
  waits.
- With an objective for the time between tokens, as many sequences run as T(S) allows. The time that then remains in a
  round bounds the prompt tokens of a step. The round includes engines whose turn has ended and which still run
  requests.
- An engine with a minimum share keeps it, even while it is paused.

The policy does not remember the present set: the grants in the snapshot show it.

**The end of a turn.** An engine whose turn ends runs m requests, and its replies have r tokens on average. The other
engines have Q requests in flight, which take W seconds of the device. The engine's next turn begins k rounds later.

- A turn begins when its set is `stay` times as good as the present one, and ends when another set is `stay` times as
  good. V is proportional to the queue, so a turn serves 1 - 1 / stay^2 of it. An engine serves a queue of q requests in
  q r / n rounds, so k = (1 - 1 / stay^2) * (sum over the others of q r / n).
- If the requests finish, their batch shrinks while every round still pays a whole `a`. When the turn ends, some
  requests have just begun and some have almost finished, so the batch shrinks evenly and is empty after r rounds. Up to
  the next turn, the lost parts of `a` total a r x^2 / 2, with x = min(k / r, 1). The requests also hold memory, which
  makes the batches of the others smaller. Assumption: this costs as much again. So finishing costs F = a r x^2.
- If the requests are preempted, computing their tokens again takes P seconds, and they wait while the others are
  served. A request of the others takes W / Q on average. Preempting m requests therefore pays if it saves more time
  than m requests of the others take: F - P > m W / Q.

If a reply takes much longer than a turn, as on a small GPU, x is small and the requests finish. So do those with an
objective for the time between tokens, and those of an engine that has finished none for long.

Sources: L. Tassiulas and A. Ephremides, "Stability properties of constrained queueing systems and scheduling policies
for maximum throughput in multihop radio networks", 1992 (max-weight); see `waterfill` for the division of memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from pydantic import Field

from runtime.control import pauses
from runtime.control.costs import ENOUGH
from runtime.control.policies.waterfill import Waterfill, water_fill
from runtime.control.policy import Decision, Sizes, bound, damp, decision, fit
from runtime.control.snapshot import EngineView, Snapshot

STALLED_S = 2.0
"""An engine whose turn it is loses it if it has not completed a step for this long, although requests run."""
ALL_SUBSETS = 4
"""The most engines of which all subsets are compared."""
LEAST_PROMPT_TOKENS = 256
"""The least that a step may compute of prompts. Less would cost many steps."""
MOST_URGENT = 10.0
"""The most by which an objective multiplies an engine's weight."""
MEASURED_BESIDE = ENOUGH / 2
"""Confidence in a cost from which objectives are kept. The cost of an engine that never computes alone has at most
ENOUGH."""
MEASURED = 0.9
"""Confidence in the lanes from which requests are preempted. Until then they finish beside the other engines, which
shows how many lanes there are."""

Engines = Sequence[int]
"""A set of engines, by their indices in the snapshot's order."""


class Turns(Waterfill):
    """A policy that admits the engines that together work off the most, and gives them the memory that they can use."""

    class Options(Waterfill.Options):
        """Options of `turns`."""

        gain: float = Field(
            default=1.2,
            ge=1,
            allow_inf_nan=False,
            description="Pause the other engines only if a set is at least this many times as good as all engines.",
        )
        stay: float = Field(
            default=1.2,
            ge=1,
            allow_inf_nan=False,
            description="Replace the present set only if another set is more than this many times as good.",
        )

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        seen = _with_minimum_shares(snapshot)
        demand = _Demand(seen, bound(seen, self.usable(seen)), 1 - 1 / self.options.stay**2)
        chosen = self._choose(demand)
        if len(chosen) == len(demand.live):
            sizes, reason = self.divide(seen)
            paused: frozenset[int] = frozenset()
        else:
            sizes = fit(seen, damp(seen, bound(seen, demand.divide(chosen)), self.options.damping))
            paused = frozenset(range(len(sizes))).difference(chosen)

            def reason(index: int) -> str:
                turn = ", ".join(seen.views[other].name for other in chosen[:3]) + ", ..." * (len(chosen) > 3)
                state = "paused" if index in paused else "served"
                return f"{seen.views[index].in_flight} in flight: {state} in the turn of {turn}"

        sequences, step_tokens = demand.limits(chosen, sizes)
        preempted = paused & demand.preempted
        return decision(seen, sizes, reason, {**sequences, **dict.fromkeys(paused, 0)}, step_tokens, preempted)

    def _choose(self, demand: "_Demand") -> Engines:
        """Return the engines to admit: all that have work, or the best set."""
        live = demand.live
        if len(live) < 2 or demand.fits:
            return live
        best_value, best = max((demand.value(candidate), candidate) for candidate in demand.candidates())
        if best_value < self.options.gain * demand.value(live):
            return live
        present = [index for index in live if demand.views[index].grant.max_active_seqs]
        if 0 < len(present) < len(live) and demand.value(present) * self.options.stay >= best_value:
            return present
        return best


class _Demand:
    """The needs of the engines of a snapshot, and the value of sets of these engines.

    `turn` is the part of its queue that an engine serves in a turn.
    """

    def __init__(self, snapshot: Snapshot, needs: Sizes, turn: float) -> None:
        self.views: Sequence[EngineView] = snapshot.views
        self._snapshot = snapshot
        self._needs = needs
        self._turn = turn
        self._shares = [view.sequence_bytes / view.priority for view in self.views]

    @cached_property
    def _kept(self) -> Sizes:
        """Return the bytes that each engine keeps while others are served."""
        return [
            min(max(float(view.limits.kv_floor_bytes), self._draining_bytes(index)), need)
            for index, (view, need) in enumerate(zip(self.views, self._needs, strict=True))
        ]

    @cached_property
    def _free_bytes(self) -> float:
        """Return the bytes that no engine keeps."""
        return self._snapshot.movable_bytes - sum(self._kept)

    @cached_property
    def fits(self) -> bool:
        """Return True if memory is enough for all needs."""
        return sum(self._needs) <= self._snapshot.movable_bytes

    @cached_property
    def live(self) -> Engines:
        """The engines that have requests, without those that complete no steps."""
        return [
            index
            for index, view in enumerate(self.views)
            if view.in_flight and (view.stalled_s < STALLED_S or not view.grant.max_active_seqs)
        ]

    @cached_property
    def preempted(self) -> frozenset[int]:
        """Return the engines whose running requests are preempted if their turn ends.

        For an engine without running requests, the grant stays as it is. The module's docstring derives the rule.
        """
        running = [
            index
            for index, view in enumerate(self.views)
            if view.running
            and view.limits.block_bytes
            and view.tpot_slo_s is None
            and view.unanswered_s <= pauses.MOST_S
        ]
        unchanged = [index for index, view in enumerate(self.views) if not view.running and view.grant.preempt]
        if self._snapshot.lanes_confidence < MEASURED:
            return frozenset(unchanged)
        requests, rounds, seconds = self._queues()
        all_requests, all_rounds, all_seconds = sum(requests), sum(rounds), sum(seconds)
        cheap = []
        for index in running:
            view = self.views[index]
            part = min(self._turn * (all_rounds - rounds[index]) / max(view.reply_tokens, 1), 1.0)
            finish_s = view.cost.step_s * view.reply_tokens * part**2
            tokens = view.kv_used_bytes / view.limits.block_bytes * view.limits.block_tokens
            again_s = tokens * view.cost.prompt_token_s
            request_s = (all_seconds - seconds[index]) / max(all_requests - requests[index], 1)
            if finish_s - again_s > view.running * request_s:
                cheap.append(index)
        return frozenset(unchanged + cheap)

    def _queues(self) -> tuple[Sizes, Sizes, Sizes]:
        """Return each engine's requests in flight, and the rounds and seconds in which it serves them with all memory.

        They are 0 for engines that are not live.
        """
        requests, rounds, seconds = ([0.0] * len(self.views) for _ in range(3))
        for index in self.live:
            view = self.views[index]
            sequences = self._snapshot.movable_bytes / max(view.sequence_bytes, 1)
            sequences = max(min(sequences, view.in_flight, view.limits.seqs_ceiling), 1.0)
            requests[index] = view.in_flight
            rounds[index] = view.in_flight * view.reply_tokens / sequences
            seconds[index] = rounds[index] * view.cost.seconds(sequences, sequences * view.prompt_ratio)
        return requests, rounds, seconds

    def _draining_bytes(self, index: int) -> float:
        """Return the memory of an engine's running requests, with room to grow; 0 if they will be preempted.

        Without room they would be preempted, and not admitted again before the engine's next turn. Half a reply is to
        come on average, but no more than a block before the next decision.
        """
        view, limits = self.views[index], self.views[index].limits
        if index in self.preempted:
            return 0.0
        blocks = min(view.reply_tokens / 2 / limits.block_tokens, 1.0) if limits.block_tokens else 0.0
        return view.kv_used_bytes + view.running * blocks * limits.block_bytes

    def candidates(self) -> Iterator[Engines]:
        """Yield the sets to compare.

        These are all subsets of up to ALL_SUBSETS engines. Of more engines, they are the first 1, 2, ... in the order
        of their value alone; from 8 on, the number doubles, so that all comparisons together take O(N).
        """
        if len(self.live) <= ALL_SUBSETS:
            for count in range(1, len(self.live)):
                yield from combinations(self.live, count)
            return
        order = sorted(self.live, key=lambda index: -self.value([index]))
        count = 1
        while count < len(order):
            yield order[:count]
            count += 1 if count < 8 else count

    def value(self, chosen: Engines) -> float:
        """Return V(S), in weighted sequences a second."""
        longest_s = together_s = worked = 0.0
        for index, sequences in zip(chosen, self._sequences(chosen, self._fill(chosen)), strict=True):
            view = self.views[index]
            step_s = view.cost.seconds(sequences, sequences * view.prompt_ratio)
            together_s += step_s
            longest_s = max(longest_s, step_s)
            worked += view.in_flight / view.priority * _urgency(view) * sequences
        return worked / max(together_s / self._snapshot.lanes, longest_s)

    def divide(self, chosen: Engines) -> Sizes:
        """Return the bytes of every engine: what the chosen ones can use, then what the others need, then the rest."""
        sizes = list(self._kept)
        for index, size in zip(chosen, self._fill(chosen), strict=True):
            sizes[index] = size
        remaining = self._snapshot.movable_bytes - sum(sizes)
        if remaining <= 0:
            return sizes
        missing = [max(need - size, 0.0) for need, size in zip(self._needs, sizes, strict=True)]
        more = water_fill(remaining, self._shares, missing)
        spread = max(remaining - sum(more), 0.0) / len(sizes)
        return [size + extra + spread for size, extra in zip(sizes, more, strict=True)]

    def limits(self, chosen: Engines, sizes: Sizes) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Return the concurrency and the step tokens, by engine, with which rounds keep the objectives per token.

        Both are empty without such objectives, if no concurrency keeps them, and until the costs are measured.
        """
        objective_s = min((o for i in self.live if (o := self.views[i].tpot_slo_s) is not None), default=None)
        if objective_s is None:
            return {}, {}
        draining = [i for i, v in enumerate(self.views) if v.running and i not in chosen and i not in self.preempted]
        # If nothing keeps the objective beside the draining engines, keep it for the time after.
        beside = self._limits_beside(draining, objective_s, chosen, sizes) if draining else None
        return beside or self._limits_beside([], objective_s, chosen, sizes) or ({}, {})

    def _limits_beside(
        self, draining: Engines, objective_s: float, chosen: Engines, sizes: Sizes
    ) -> tuple[Mapping[int, int], Mapping[int, int]] | None:
        """Return what `limits` does, for rounds in which some engines still run requests; None if nothing keeps it."""
        stepping = [*chosen, *draining]
        costs = [self.views[index].cost for index in stepping]
        if any(cost.confidence < MEASURED_BESIDE for cost in costs):
            return None
        lanes = min(self._snapshot.lanes, len(stepping))
        drain_s = sum(self.views[index].cost.sequence_s * self.views[index].running for index in draining) / lanes
        left_s = objective_s - sum(cost.step_s for cost in costs) / lanes - drain_s
        if left_s <= 0:
            return None
        counts = dict(zip(chosen, self._sequences(chosen, [sizes[index] for index in chosen]), strict=True))
        decode_s = prefill_s = 0.0
        for index, count in counts.items():
            view = self.views[index]
            decode_s += view.cost.sequence_s * count / lanes
            prefill_s += view.cost.prompt_token_s * view.prompt_ratio * count / lanes
        part = min(left_s / (decode_s + prefill_s), 1.0) if decode_s + prefill_s else 1.0
        prompts_s = (left_s - part * decode_s) * lanes
        sequences, step_tokens = {}, {}
        for index, cost in zip(stepping, costs, strict=True):
            limits = self.views[index].limits
            if part < 1 and index in counts:
                sequences[index] = min(max(int(part * counts[index]), 1), limits.seqs_ceiling)
            if cost.prompt_token_s:
                most = 2.0 * limits.step_tokens_ceiling  # a cost of almost nothing would allow any number
                prompt_tokens = max(int(min(prompts_s / cost.prompt_token_s, most)), LEAST_PROMPT_TOKENS)
                rounded = 1 << prompt_tokens.bit_length() - 1  # so that it rarely changes
                tokens = min(limits.seqs_ceiling + rounded, limits.step_tokens_ceiling)
                step_tokens[index] = max(tokens, limits.step_tokens_floor)
        return sequences, step_tokens

    def _sequences(self, chosen: Engines, sizes: Sizes) -> list[float]:
        """Return how many sequences each engine of a set can run in its bytes."""
        return [
            min(size / max(view.sequence_bytes, 1), view.in_flight, view.limits.seqs_ceiling)
            for size, view in zip(sizes, [self.views[index] for index in chosen], strict=True)
        ]

    def _fill(self, chosen: Engines) -> Sizes:
        """Divide the memory that is free for a set among its engines, max-min fairly."""
        free_bytes = self._free_bytes + sum([self._kept[index] for index in chosen])
        return water_fill(
            free_bytes, [self._shares[index] for index in chosen], [self._needs[index] for index in chosen]
        )


def _urgency(view: EngineView) -> float:
    """Return by how much the wait for an engine multiplies its weight: 1 without an objective or a wait.

    It grows as the oldest request uses up the time that it can wait: the objective for a first token, or that for a
    job or a call less the time of a reply. At least half of an objective counts, because one that is shorter than a
    reply would otherwise always be urgent.
    """
    reply_s = view.reply_tokens * view.cost.seconds(max(view.running, 1))
    used = 0.0
    if view.ttft_slo_s is not None:
        used = view.oldest_wait_s / view.ttft_slo_s
    if view.slo_s is not None:
        used = max(used, view.oldest_wait_s / max(view.slo_s - reply_s, view.slo_s / 2))
    if view.jct_slo_s is not None:
        used = max(used, view.oldest_job_s / max(view.jct_slo_s - reply_s, view.jct_slo_s / 2))
    return 1 / max(1 - used, 1 / MOST_URGENT)


def _with_minimum_shares(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with the engines' minimum shares in their floors, in whole blocks."""
    total = sum([view.minimum_share or 0.0 for view in snapshot.views])
    if not total:
        return snapshot
    above_floors = snapshot.movable_bytes - sum([view.limits.kv_floor_bytes for view in snapshot.views])
    engines = {}
    for name, view in snapshot.engines.items():
        limits = view.limits
        floor = limits.kv_floor_bytes + max(above_floors, 0) * (view.minimum_share or 0.0) / max(total, 1.0)
        floor = min(int(floor), limits.kv_ceiling_bytes)
        floor = max(floor - floor % (limits.block_bytes or 1), limits.kv_floor_bytes)
        engines[name] = replace(view, limits=replace(limits, kv_floor_bytes=floor))
    return replace(snapshot, engines=engines)
