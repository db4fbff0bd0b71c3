"""The workflow `deliberate`."""

from collections import Counter
from collections.abc import Mapping

from pydantic import Field

from agents.tasks import Solution, Verdict
from agents.workflow import RoleCall
from agents.workflows.planned import PlannedWorkflow, StepState, most_common, verdict_word


class Deliberate(PlannedWorkflow):
    """A deliberation: plan, solve each step, let critics judge the result, revise rejected results, answer.

    The solver works on independent steps at the same time. A result is accepted if every critic accepts it. If a critic
    rejects the result of the last round, the workflow continues with the most frequent result and ends unconfirmed.
    """

    class Options(PlannedWorkflow.Options):
        """The settings of `deliberate`."""

        rounds: int = Field(
            default=3, ge=0, le=100, description="Maximum number of times that a rejected step is solved again."
        )

    options: Options

    def _start(self, state: StepState) -> list[RoleCall]:
        return [self._solve(state)]

    def _certain(self, state: StepState) -> Mapping[str, int]:
        calls = Counter(self.options.critics if len(state.tried) <= state.round else ())
        if not state.started:
            calls["solver"] += 1
        return calls

    def _solved(self, state: StepState, call: RoleCall, reply: Solution) -> list[RoleCall]:
        self._record_solution(state, call, reply)
        if not self.options.critics:
            return self._settle(state, reply.result, confirmed=None)
        state.judged[reply.result] = []
        return self._critique(state, reply.result, self.options.critics)

    def _judged(self, state: StepState, result: str, verdict: Verdict) -> list[RoleCall]:
        verdicts = state.judged[result]
        verdicts.append(verdict)
        if len(verdicts) < len(self.options.critics):
            return []
        accepted = all(v.accepted for v in verdicts)
        state.entries[-1].verdict = verdict_word(accepted)
        if accepted:
            return self._settle(state, result, confirmed=True)
        if state.round == self.options.rounds:
            return self._settle(state, most_common(state.tried), confirmed=False)
        state.round += 1
        self.rounds = max(self.rounds, state.round)
        feedback = "; ".join(v.reason for v in verdicts if not v.accepted and v.reason)
        return [self._solve(state, feedback or "the critic rejected it", variation=state.round)]
