"""Estimates what a step of each engine costs, and how many engines the device serves at once, from what steps took.

A step of n sequences that computes p prompt tokens takes `step_s + sequence_s * n + prompt_token_s * p` while its
engine has the device to itself. On a device with L lanes, m engines that compute at once each take max(1, m / L) times
as long. With L = 1 they take turns; with L = m they do not slow each other down.

**Costs.** Between two snapshots an engine completes a few steps. Their mean is one sample of a least-squares fit.
Samples count by relative error, and old ones fade as new ones arrive. Samples of an engine that computed alone make its
cost. Until there are enough of these, the cost comes from samples beside other engines, divided by the estimated
slowdown. A weak prior makes a fit exist from the start.

**Lanes.** While m engines compute at once, the lanes are the sum of their speeds, each relative to its engine alone. If
that is m, there are at least m lanes. Where NVML reports the GPU's utilization, the lanes are the work per second in
which the engines keep it busy. An engine that alone keeps it busy for half of its steps leaves room for a second one.
If several together keep it busy all the time, there is room for no more than they do.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

from runtime.engines.handle import EngineStats, Work

MEMORY_S = 30.0
"""Seconds of samples after which a sample weighs 1/e of a new one."""
MIX_MEMORY_S = 5.0
"""Seconds of samples after which a sample of the mix of prompts and replies weighs 1/e of a new one."""
STALE_S = 300.0
"""Seconds without a new sample after which the confidence in a cost has fallen to 1/e."""
PRIOR_SAMPLES = 5.0
"""Samples that make a cost as much measured as assumed."""
PRIOR_WEIGHT = 0.1
"""Weight of the prior in a fit, in samples."""
PRIOR_SPREAD = 10.0
"""The prior may be wrong by about this factor."""
PRIOR_LANES_S = 0.1
"""Weight of the prior for the lanes, in seconds of evidence."""
ENOUGH = 0.5
"""Confidence in the costs of all engines that is enough to measure the lanes."""
OUTLIER = 4.0
"""A sample above the fit by more than this factor counts as this much: a stall is not the cost of a step."""
SAMPLES_PER_LOOK = 16
"""About how many samples beside other engines are added at a time, because each takes about 30 µs."""
SHORTEST_STEP_S, LONGEST_STEP_S = 1e-5, 100.0
"""Reports of a mean step outside of these are refused. No GPU launches the kernels of a step in less."""
MOST_IN_STEP = 1_000_000
"""Reports of more sequences and prompt tokens in a mean step are refused."""
SATURATED = 0.9
"""A GPU with at least this utilization has no room. Engines limit each other if their speeds add up to less than this
part of their number."""
LEAST_UTILIZATION = 0.1
"""Below this utilization, rounding makes the lanes that follow from it too uncertain."""
UTILIZATION_S = 1.0
"""NVML averages the utilization over up to this time."""


@dataclass(frozen=True)
class Utilization:
    """The part of the time in which a GPU is busy, from 0 to 1.

    `device` counts all processes, and `own` only those of the engines. `own` is None if NVML does not report it for
    every engine that computes; then all of `device` counts as theirs.
    """

    device: float
    own: float | None = None

    @property
    def by_engines(self) -> float:
        """The part of the time in which the engines keep the GPU busy."""
        return self.device if self.own is None else min(self.device, self.own)

    @property
    def saturated(self) -> bool:
        """True if the engines leave no room on the GPU."""
        return self.by_engines >= SATURATED

    @property
    def unsaturated(self) -> float | None:
        """Return `by_engines`, or None if that says nothing about the GPU's room.

        A GPU that another process fills slows the engines down, and says nothing about how they would share it.
        """
        return self.by_engines if self.by_engines > LEAST_UTILIZATION and self.device < SATURATED else None


@dataclass(frozen=True)
class StepCost:
    """The time of a step, in seconds: `step_s`, plus `sequence_s` a sequence, plus `prompt_token_s` a prompt token.

    `confidence` is the measured part of the estimate, from 0 (assumed) to 1. `fault` says why nothing was measured.
    """

    step_s: float
    sequence_s: float
    prompt_token_s: float
    confidence: float = 0.0
    fault: str | None = None

    def seconds(self, sequences: float, prompt_tokens: float = 0.0, steps: int = 1) -> float:
        """Return the time of some steps together, with the device to themselves."""
        return self.step_s * steps + self.sequence_s * sequences + self.prompt_token_s * prompt_tokens


PRIOR = StepCost(step_s=0.004, sequence_s=0.00015, prompt_token_s=0.00003)
"""A small model on a CPU core."""
PRIOR_LANES = 1.0
"""Assume that engines take turns until it is measured. The policy `turns` then serves them in turns, which shows what
each costs alone; on a device with more lanes it soon stops."""
_PRIOR = (PRIOR.step_s, PRIOR.sequence_s, PRIOR.prompt_token_s)
_RIDGE = tuple(PRIOR_WEIGHT / (PRIOR_SPREAD * value) ** 2 for value in _PRIOR)


@dataclass
class _Fit:
    """The faded samples of one engine: their number, and the normal equations for its three costs."""

    at_s: float
    samples: float = 0.0
    matrix: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    right: list[float] = field(default_factory=lambda: [0.0] * 3)
    cost: StepCost = PRIOR

    def add(self, now_s: float, steps: Work, slowdown: float = 1.0) -> None:
        """Add the mean of some steps as a sample, and update the cost."""
        sequences, prompt_tokens = steps.sequences / steps.steps, steps.prompt_tokens / steps.steps
        expected_s = step_s = steps.busy_s / steps.steps / slowdown
        if self.cost.confidence > ENOUGH:
            expected_s = self.cost.seconds(sequences, prompt_tokens)
            step_s = min(step_s, OUTLIER * expected_s)
        fade = math.exp(-min(now_s - self.at_s, 1.0) / MEMORY_S)
        self.at_s = now_s
        self.samples = fade * self.samples + 1
        row = [1 / expected_s, sequences / expected_s, prompt_tokens / expected_s]  # errors count in relation to a step
        for i, value in enumerate(row):
            for j, other in enumerate(row):
                self.matrix[i][j] = fade * self.matrix[i][j] + value * other
            self.right[i] = fade * self.right[i] + value * step_s / expected_s
        matrix = [[value + _RIDGE[i] * (i == j) for j, value in enumerate(row)] for i, row in enumerate(self.matrix)]
        right = [value + ridge * prior for value, ridge, prior in zip(self.right, _RIDGE, _PRIOR, strict=True)]
        step, sequence, token = _non_negative(matrix, right)
        self.cost = StepCost(max(step, 1e-6), sequence, token, self.samples / (self.samples + PRIOR_SAMPLES))

    def confidence(self, now_s: float) -> float:
        """Return the confidence in the cost, which falls while no sample arrives."""
        return self.cost.confidence * math.exp(-max(now_s - self.at_s - 1.0, 0.0) / STALE_S)


@dataclass
class _Together:
    """Engines that compute at once without a change since a time, and those that have completed a step since then."""

    engines: frozenset[str] = frozenset()
    since_s: float = 0.0
    stepped: set[str] = field(default_factory=set)


class Costs:
    """The costs of the engines of one device, learnt from their work.

    `lanes` is how many engines the device serves at full speed at once; `confidence` is the measured part of it.
    """

    def __init__(self) -> None:
        self._alone: dict[str, _Fit] = {}
        self._beside: dict[str, _Fit] = {}
        self._mixes: dict[str, tuple[float, float]] = {}  # faded sums of prompt tokens and of sequences in steps
        self._faults: dict[str, str] = {}
        self._work: dict[str, Work] = {}
        self._now_s: float | None = None
        self._looks = 0
        self._together = _Together()
        # Faded sums in seconds: work that was done, and time in which the device was busy; the evidence for the lanes.
        self._worked_s = self._busy_s = 0.0
        # The same within the time that NVML averages over: work and all time.
        self._recently_worked_s = self._recent_s = 0.0

    def cost(self, engine: str) -> StepCost:
        """Return the cost of an engine's steps.

        Until the engine has computed alone often enough, its confidence is below ENOUGH.
        """
        if engine in self._faults:
            return replace(PRIOR, fault=self._faults[engine])
        now_s = self._now_s or 0.0
        alone, beside = self._alone.get(engine), self._beside.get(engine)
        if alone and ((confidence := alone.confidence(now_s)) >= ENOUGH or not beside):
            return replace(alone.cost, confidence=confidence)
        return replace(beside.cost, confidence=ENOUGH * beside.confidence(now_s)) if beside else PRIOR

    def prompt_ratio(self, engine: str) -> float:
        """Return how many prompt tokens the engine has computed recently for each sequence in a step."""
        prompt_tokens, sequences = self._mixes.get(engine, (0.0, 0.0))
        return prompt_tokens / sequences if sequences else 0.0

    @property
    def lanes(self) -> float:
        """Return how many engines the device serves at full speed at once."""
        return max((self._worked_s + PRIOR_LANES * PRIOR_LANES_S) / (self._busy_s + PRIOR_LANES_S), 1.0)

    @property
    def confidence(self) -> float:
        """Return the measured part of `lanes`, from 0 (assumed) to 1."""
        return self._busy_s / (self._busy_s + PRIOR_LANES_S)

    def look(
        self,
        now_s: float,
        stats: Mapping[str, EngineStats],
        in_flight: Mapping[str, int],
        utilization: Utilization | None = None,
    ) -> None:
        """Learn from what the engines have done since the last look, and from the GPU's utilization, if known."""
        elapsed_s = 0.0 if self._now_s is None else now_s - self._now_s
        self._now_s = now_s
        done = {name: new for name, latest in stats.items() if (new := self._new(name, latest.work)) is not None}
        # The first step of a request counts no running request before it has ended.
        computing = frozenset(
            name
            for name, latest in stats.items()
            if name in done or latest.running or (in_flight[name] and latest.grant and latest.grant.max_active_seqs)
        )
        if elapsed_s <= 0:
            return
        self._mix(elapsed_s, done)
        self._fit(now_s, computing, done)
        self._learn_lanes(now_s, elapsed_s, computing, done, utilization)

    def _new(self, name: str, after: Work) -> Work | None:
        """Return what an engine has done since the last look; None if nothing, or if the report cannot be true."""
        before = self._work.get(name)
        if after is before:
            return None
        self._work[name] = after
        if before is None or after.steps <= before.steps:
            return None
        counts = [now - then for now, then in zip(astuple(after), astuple(before), strict=True)]
        if min(counts) < 0 and all(count >= 0 for count in astuple(after)):
            return None  # it restarted, and has made more steps than before
        new = Work(*counts)
        computed = new.sequences + new.prompt_tokens
        possible = min(counts) >= 0 < computed <= MOST_IN_STEP * new.steps
        possible = possible and SHORTEST_STEP_S * new.steps <= new.busy_s <= LONGEST_STEP_S * new.steps
        if possible:
            self._faults.pop(name, None)
            return new
        self._alone.pop(name, None)
        self._beside.pop(name, None)
        if name not in self._faults:
            self._faults[name] = (
                f"it reported steps of {new.busy_s / new.steps:g} s with {new.sequences} sequences and "
                f"{new.prompt_tokens} prompt tokens in {new.steps}; a step takes {SHORTEST_STEP_S:g} to "
                f"{LONGEST_STEP_S:g} s and computes 1 to {MOST_IN_STEP} of them"
            )
            logging.getLogger(__name__).warning("cost of engine %s: assumed, because %s", name, self._faults[name])
        return None

    def _mix(self, elapsed_s: float, done: Mapping[str, Work]) -> None:
        fade = math.exp(-elapsed_s / MIX_MEMORY_S)
        for name, new in done.items():
            prompt_tokens, sequences = self._mixes.get(name, (0.0, 0.0))
            self._mixes[name] = fade * prompt_tokens + new.prompt_tokens, fade * sequences + new.sequences

    def _fit(self, now_s: float, computing: frozenset[str], done: Mapping[str, Work]) -> None:
        """Add a sample to the fit of the engine that computed alone, or to some fits of engines beside each other."""
        if len(computing) == 1:
            for name, new in done.items():
                self._alone.setdefault(name, _Fit(now_s)).add(now_s, new)
            return
        slowdown = max(len(computing) / self.lanes, 1.0)
        unknown = [name for name in done if self.cost(name).confidence < ENOUGH]
        self._looks += 1
        every = len(unknown) // SAMPLES_PER_LOOK + 1
        for name in unknown[self._looks % every :: every]:
            self._beside.setdefault(name, _Fit(now_s)).add(now_s, done[name], slowdown)

    def _learn_lanes(
        self,
        now_s: float,
        elapsed_s: float,
        computing: frozenset[str],
        done: Mapping[str, Work],
        utilization: Utilization | None,
    ) -> None:
        """Take the time since the last look as evidence for the lanes."""
        settled = self._together.stepped >= computing  # their steps since the last look all began beside each other
        if computing != self._together.engines:
            self._together = _Together(computing, now_s)
            settled = False
        self._together.stepped.update(done)
        lasting = now_s - self._together.since_s > 2 * UTILIZATION_S  # longer than NVML averages
        costs = {name: self.cost(name) for name in computing}
        if any(cost.confidence < ENOUGH for cost in costs.values()):
            return
        alone_s = {name: costs[name].seconds(new.sequences, new.prompt_tokens, new.steps) for name, new in done.items()}
        fade = math.exp(-elapsed_s / UTILIZATION_S)
        self._recently_worked_s = fade * self._recently_worked_s + sum(alone_s.values())
        self._recent_s = fade * self._recent_s + elapsed_s
        if not computing:
            return
        recent_work = self._recently_worked_s / self._recent_s
        if utilization and (busy := utilization.unsaturated) is not None:
            self._add_evidence(elapsed_s * recent_work, elapsed_s * busy)
        elif len(computing) > 1 and settled and done.keys() == computing:
            speed = sum(alone_s[name] / new.busy_s for name, new in done.items())
            if speed < SATURATED * len(computing):
                self._add_evidence(elapsed_s * speed, elapsed_s)
            elif self.lanes < len(computing):
                self._add_evidence(elapsed_s * len(computing), elapsed_s)
        elif utilization and utilization.saturated and len(computing) > 1 and lasting:
            self._add_evidence(elapsed_s * recent_work, elapsed_s)

    def _add_evidence(self, worked_s: float, busy_s: float) -> None:
        fade = math.exp(-busy_s / MEMORY_S)
        self._worked_s = fade * self._worked_s + worked_s
        self._busy_s = fade * self._busy_s + busy_s


def _non_negative(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve `matrix x = right` (symmetric, positive definite) for the least-squares x without negative elements.

    The most negative element is set to 0 and the others are solved again, until none is negative.
    """
    free = list(range(len(right)))
    while free:
        solved = _solve([[matrix[i][j] for j in free] for i in free], [right[i] for i in free])
        if min(solved) >= 0:
            values = dict(zip(free, solved, strict=True))
            return [values.get(index, 0.0) for index in range(len(right))]
        del free[solved.index(min(solved))]
    return [0.0] * len(right)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small positive definite system by Gaussian elimination. numpy would make every command start later."""
    size = len(right)
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            for column in range(pivot, size):
                matrix[row][column] -= factor * matrix[pivot][column]
            right[row] -= factor * right[pivot]
    solved = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(matrix[row][column] * solved[column] for column in range(row + 1, size))
        solved[row] = (right[row] - rest) / matrix[row][row]
    return solved
