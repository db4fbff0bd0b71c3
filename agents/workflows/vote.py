"""The workflow `vote`."""

from collections import Counter
from collections.abc import Mapping

from pydantic import Field

from agents.tasks import Solution, Verdict
from agents.workflow import RoleCall
from agents.workflows.planned import PlannedWorkflow, StepState, most_common, verdict_word


class Vote(PlannedWorkflow):
    """A vote: plan, solve each step several times, let critics judge each distinct result, take the majority.

    The critics judge each distinct result once. The workflow continues with the most frequent result that every critic
    accepts. If the critics accept no result, the workflow continues with the most frequent one and ends unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """The settings of `vote`."""

        samples: int = Field(default=3, ge=1, le=100, description="The number of times that each step is solved.")
        critics: tuple[str, ...] = Field(
            default=("critic",), min_length=1, description="Seats that judge the samples, at least one."
        )

    options: Options

    def _start(self, state: StepState) -> list[RoleCall]:
        return [self._solve(state, variation=sample) for sample in range(1, self.options.samples + 1)]

    def _certain(self, state: StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) < self.options.samples else ())
        if not state.started:
            calls["solver"] += self.options.samples
        return calls

    def _solved(self, state: StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record_solution(state, call, reply)
        if len(state.tried) < self.options.samples:
            return []
        state.judged = {result: [] for result in state.tried}
        return [c for result in state.judged for c in self._critique(state, result, self.options.critics)]

    def _judged(self, state: StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        state.judged[result].append(verdict)
        if any(len(verdicts) < len(self.options.critics) for verdicts in state.judged.values()):
            return []
        accepted = [r for r in state.tried if all(v.accepted for v in state.judged[r])]
        for tried, entry in zip(state.tried, state.entries, strict=True):
            entry.verdict = verdict_word(tried in accepted)
        return self._settle(state, most_common(accepted or state.tried), confirmed=bool(accepted))
