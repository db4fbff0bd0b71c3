"""Estimates what a step of each engine costs, and how many engines the device serves at once, from the engines' work.

A step of n sequences that computes p prompt tokens takes `step_s + sequence_s * n + prompt_token_s * p` while its
engine has the device to itself. On a device with L lanes, m engines that compute at once each take max(1, m / L) times
as long. With L = 1 they take turns; with L = m they do not slow each other down.

Every look at the engines' counters gives the mean step of each engine since the last look: one row of a least-squares
fit. Rows count by relative error and fade with time. Rows in which other engines computed too make a fit of their own,
for the time until there are enough of the others: their time must be divided by the slowdown, an estimate itself. A
weak prior gives a fit from the start.

The lanes are the work that engines do together (in seconds that
they would take alone) per second in which the device is busy. It is busy throughout while two engines compute without a
pause. Where NVML reports its utilization, it is busy for that part of the time: an engine that alone keeps a GPU busy
for half of its steps leaves room for a second one.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.engines.handle import EngineStats, Work

MEMORY_S = 30.0
"""Seconds after which a row weighs 1/e of a new one."""
MIX_MEMORY_S = 5.0
"""Seconds in which an engine computes after which the mix of prompts and replies in its steps weighs 1/e."""
PRIOR_ROWS = 2.0
"""Rows that make a cost as much measured as assumed."""
ENOUGH = 0.5
"""Confidence in the costs of all engines that is enough to measure the lanes."""
LONGEST_FADE_S = 1.0
"""Rows fade at most as if the next one came after this time, so that a fit lasts while its engine has no new rows."""
PRIOR_WEIGHT = 0.1
"""Weight of the prior in a fit, in rows."""
PRIOR_SPREAD = 10.0
"""The prior may be wrong by about this factor."""
PRIOR_LANES_S = 0.1
"""Weight of the prior for the lanes, in seconds of evidence."""
OUTLIER = 4.0
"""A row above the fit by more than this factor counts as this much: a stall is not the cost of a step."""
ROWS_PER_LOOK = 16
"""About how many rows beside other engines a look adds at most, because each takes about 30 µs."""
LONGEST_STEP_S = 100.0
"""A longer mean step is absurd."""
BUSY, IDLE = 0.7, 0.1
"""An engine computes throughout the time between two looks if its steps cover this part of it, and not at all if they
cover less than that."""
SATURATED = 0.9
"""Below this part of the work that the engines would do alone, the device limits them."""
UTILIZATION_S = 1.0
"""NVML averages the utilization over up to this time."""


@dataclass(frozen=True)
class StepCost:
    """What a step takes, in seconds: `step_s`, plus `sequence_s` a sequence, plus `prompt_token_s` a prompt token.

    `confidence` is the measured part of the estimate, from 0 (assumed) to 1. `fault` says why nothing was measured.
    """

    step_s: float
    sequence_s: float
    prompt_token_s: float
    confidence: float = 0.0
    fault: str | None = None

    def seconds(self, sequences: float, prompt_tokens: float = 0.0) -> float:
        """Return the time of a step with the device to itself."""
        return self.step_s + self.sequence_s * sequences + self.prompt_token_s * prompt_tokens


PRIOR = StepCost(step_s=0.004, sequence_s=0.00015, prompt_token_s=0.00003)
"""A small model on a CPU core."""
_PRIOR = np.array((PRIOR.step_s, PRIOR.sequence_s, PRIOR.prompt_token_s))
_RIDGE = PRIOR_WEIGHT / (PRIOR_SPREAD * _PRIOR) ** 2
PRIOR_LANES = 1.0
"""Assume that engines take turns until it is measured. The policy `turns` then serves them in turns, which shows what
each costs alone; on a device with more lanes it soon stops."""


class _Fit:
    """The faded rows of one engine: their number and the normal equations for its three costs."""

    def __init__(self) -> None:
        self.cost = PRIOR
        self._rows = 0.0
        self._matrix = np.zeros((3, 3))
        self._right = np.zeros(3)
        self._at_s = -math.inf

    def add(self, now_s: float, sequences: float, prompt_tokens: float, step_s: float) -> None:
        """Add a row: a mean step of this many sequences, prompt tokens and seconds. Update the cost."""
        expected_s = step_s
        if self.cost.confidence > ENOUGH:
            expected_s = self.cost.seconds(sequences, prompt_tokens)
            step_s = min(step_s, OUTLIER * expected_s)
        fade = math.exp(-min(now_s - self._at_s, LONGEST_FADE_S) / MEMORY_S)
        self._at_s = now_s
        row = np.array((1.0, sequences, prompt_tokens)) / expected_s  # so that errors count in relation to the step
        self._rows = fade * self._rows + 1
        self._matrix = fade * self._matrix + np.outer(row, row)
        self._right = fade * self._right + row * step_s / expected_s
        step, sequence, token = _non_negative(self._matrix + np.diag(_RIDGE), self._right + _RIDGE * _PRIOR)
        self.cost = StepCost(max(step, 1e-6), sequence, token, self._rows / (self._rows + PRIOR_ROWS))


class Costs:
    """The costs of the engines of one device, learnt from their work.

    `lanes` is how many engines the device serves at full speed at once; `confidence` is the measured part of it.
    """

    def __init__(self) -> None:
        self._alone: dict[str, _Fit] = {}
        self._together: dict[str, _Fit] = {}
        self._looks = 0
        self._mixes: dict[str, tuple[float, float]] = {}  # faded sums of prompt tokens and of sequences in steps
        self._work: dict[str, Work] = {}
        self._looked_s: float | None = None
        # Faded sums of the evidence for the lanes, in seconds: work that was done, and time of a busy device.
        self._worked_s = self._busy_s = 0.0
        self._rate = 0.0  # work per second, averaged over UTILIZATION_S
        self._faults: dict[str, str] = {}

    def cost(self, engine: str) -> StepCost:
        """Return the cost of an engine's steps.

        Until the engine has computed alone for a few looks, the cost comes from steps beside others, with a confidence
        below ENOUGH. Until it has computed at all, it is the prior.
        """
        if engine in self._faults:
            return replace(PRIOR, fault=self._faults[engine])
        alone, together = self._alone.get(engine), self._together.get(engine)
        if alone and (alone.cost.confidence >= ENOUGH or not together):
            return alone.cost
        return replace(together.cost, confidence=ENOUGH * together.cost.confidence) if together else PRIOR

    def prompt_ratio(self, engine: str) -> float:
        """Return how many prompt tokens the engine has computed recently for each token that it generated."""
        prompt_tokens, sequences = self._mixes.get(engine, (0.0, 0.0))
        return prompt_tokens / sequences if sequences else 0.0

    @property
    def lanes(self) -> float:
        """How many engines the device serves at full speed at once."""
        busy_s = self._busy_s + PRIOR_LANES_S
        return max((self._worked_s + PRIOR_LANES * PRIOR_LANES_S) / busy_s, 1.0)

    @property
    def confidence(self) -> float:
        """The measured part of `lanes`, from 0 (assumed) to 1."""
        return self._busy_s / (self._busy_s + PRIOR_LANES_S)

    def look(self, now_s: float, stats: Mapping[str, EngineStats], utilization: float | None = None) -> None:
        """Learn from what the engines have done since the last look, and from the device's utilization, if known."""
        elapsed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        done: dict[str, Work] = {}
        for name, latest in stats.items():
            counts, before = latest.work, self._work.get(name)
            if counts is before:
                continue
            self._work[name] = counts
            if before is None or counts.steps < before.steps:
                continue  # a new engine, or one that restarted
            if (new := self._new(name, before, counts)) is not None:
                done[name] = new
                fade = math.exp(-elapsed_s / MIX_MEMORY_S)
                prompt_tokens, sequences = self._mixes.get(name, (0.0, 0.0))
                self._mixes[name] = fade * prompt_tokens + new.prompt_tokens, fade * sequences + new.sequences
        if elapsed_s <= 0 or not done:
            self._fade_rate(elapsed_s, 0.0)
            return
        parts = {name: min(new.busy_s / elapsed_s, 1.0) for name, new in done.items()}
        computing = [name for name, latest in stats.items() if latest.running or name in done]
        if len(computing) == 1:
            self._add_row(self._alone, now_s, computing[0], done[computing[0]], 1.0)
        else:
            slowdown = max(len(computing) / self.lanes, 1.0)
            unknown = [name for name in done if self.cost(name).confidence < ENOUGH]
            self._looks += 1
            every = len(unknown) // ROWS_PER_LOOK + 1
            for name in unknown[self._looks % every :: every]:
                self._add_row(self._together, now_s, name, done[name], slowdown)
        self._learn_lanes(elapsed_s, done, parts, utilization)

    def _new(self, name: str, before: Work, after: Work) -> Work | None:
        """Return what an engine has done between two looks; None, and note a fault, if that cannot be true."""
        steps = after.steps - before.steps
        if not steps:
            return None
        new = Work(
            steps,
            after.busy_s - before.busy_s,
            after.sequences - before.sequences,
            after.prompt_tokens - before.prompt_tokens,
        )
        if (
            0 < new.busy_s < LONGEST_STEP_S * steps
            and min(new.sequences, new.prompt_tokens) >= 0 < new.sequences + new.prompt_tokens
        ):
            self._faults.pop(name, None)
            return new
        self._alone.pop(name, None)
        self._together.pop(name, None)
        if name not in self._faults:
            self._faults[name] = f"it reported {steps} steps, {new.busy_s:g} s, {new.sequences} sequences"
            logging.getLogger(__name__).warning("cost of engine %s: assumed, because %s", name, self._faults[name])
        return None

    def _add_row(self, fits: dict[str, _Fit], now_s: float, name: str, new: Work, slowdown: float) -> None:
        fit = fits.setdefault(name, _Fit())
        step_s = new.busy_s / new.steps / slowdown
        fit.add(now_s, new.sequences / new.steps, new.prompt_tokens / new.steps, step_s)

    def _learn_lanes(
        self, elapsed_s: float, done: Mapping[str, Work], parts: Mapping[str, float], utilization: float | None
    ) -> None:
        """Take the time since the last look as evidence for the lanes, if the device was busy in it."""
        worked_s = 0.0
        for name, new in done.items():
            cost = self.cost(name)
            worked_s += (
                cost.step_s * new.steps + cost.sequence_s * new.sequences + cost.prompt_token_s * new.prompt_tokens
            )
        self._fade_rate(elapsed_s, worked_s / elapsed_s)
        if any(self.cost(name).confidence < ENOUGH for name in done):
            return
        computing = sum(part >= BUSY for part in parts.values())
        if utilization is not None and IDLE < utilization < SATURATED:
            self._add_evidence(self._rate * elapsed_s, utilization * elapsed_s)
        elif computing > 1 and all(part >= BUSY or part <= IDLE for part in parts.values()):
            if worked_s < SATURATED * computing * elapsed_s:
                self._add_evidence(worked_s, elapsed_s)
            elif self.lanes < computing:  # they do not slow each other down
                self._add_evidence(computing * elapsed_s, elapsed_s)

    def _fade_rate(self, elapsed_s: float, rate: float) -> None:
        self._rate += (1 - math.exp(-elapsed_s / UTILIZATION_S)) * (rate - self._rate)

    def _add_evidence(self, worked_s: float, busy_s: float) -> None:
        fade = math.exp(-busy_s / MEMORY_S)
        self._worked_s = fade * self._worked_s + worked_s
        self._busy_s = fade * self._busy_s + busy_s


def _non_negative(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> list[float]:
    """Solve `matrix x = right` (symmetric, positive definite) for the least-squares x without negative elements.

    The most negative element is set to 0 and the others are solved again, until none is negative.
    """
    values = np.zeros(len(right))
    free = np.arange(len(right))
    while len(free):
        solved = np.linalg.solve(matrix[np.ix_(free, free)], right[free])
        worst = int(solved.argmin())
        if solved[worst] >= 0:
            values[free] = solved
            break
        free = np.delete(free, worst)
    return [float(value) for value in values]
