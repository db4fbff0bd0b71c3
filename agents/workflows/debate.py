"""The workflow `debate`."""

from collections.abc import Mapping

from pydantic import Field

from agents.role import Reply, Task, Value
from agents.tasks import Argument, DebateTask, JudgeTask, Ranking
from agents.workflow import Outcome, RoleCall, Unusable, Workflow, wrong_type
from agents.workflows.planned import most_common


class Debate(Workflow):
    """A debate: several seats answer, read each other's answers and revise their own, and a judge decides.

    If all debaters give the same answer in a round, that answer is the confirmed outcome. Otherwise the judge, or the
    majority if there is no judge, chooses an answer of the last round, and the outcome is not confirmed.
    """

    class Options(Value):
        """The settings of `debate`."""

        debaters: tuple[str, ...] = Field(
            default=("solver", "solver", "solver"),
            min_length=2,
            max_length=100,
            description="Seats that debate. A seat that occurs several times debates with itself, at a higher "
            "temperature.",
        )
        rounds: int = Field(
            default=1, ge=0, le=100, description="The number of times that the debaters revise their answers."
        )
        judge: str | None = Field(
            default="judge", description="Seat that ranks the last answers. Without one (null), the majority decides."
        )

    options: Options

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        assert isinstance(options, Debate.Options)
        seats: dict[str, tuple[type[Task], ...]] = dict.fromkeys(options.debaters, (DebateTask,))
        if options.judge is not None:
            seats[options.judge] = (*seats.get(options.judge, ()), JudgeTask)
        return seats

    def __init__(self, problem: str, options: Value) -> None:
        super().__init__(problem, options)
        self._debaters: dict[int, int] = {}
        self._said: dict[int, Argument] = {}
        self._candidates: list[Argument] = []

    def begin(self) -> list[RoleCall]:
        return self._ask_round()

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if self.outcome:
            return []  # the problem failed while the call was open
        if isinstance(reply, Ranking) and not 1 <= reply.order[0] <= len(self._candidates):
            reply = Unusable(f"candidate {reply.order[0]} does not exist; there are {len(self._candidates)}")
        if isinstance(reply, Unusable):
            return self._ask_again(call, reply)
        match call.task, reply:
            case DebateTask(), Argument():
                self.record(call, reply, revisions=self.rounds)
                self._said[self._debaters.pop(call.number)] = reply
                return [] if self._debaters else self._end_round()
            case JudgeTask(), Ranking():
                self.record(call, reply)
                return self._end(self._candidates[reply.order[0] - 1].answer, confirmed=False)
            case _:
                raise wrong_type(call.task, reply)

    def ahead(self) -> Mapping[str, int]:
        return {}  # the debaters may agree after any round

    def _ask_round(self) -> list[RoleCall]:
        """Ask every debater. From the second round on, a debater reads all answers of the previous round."""
        said, self._said = self._said, {}
        calls = []
        for place, seat in enumerate(self.options.debaters):
            others = tuple(argument.stated() for other, argument in sorted(said.items()) if other != place)
            own = said[place].stated() if said else ""
            same_seat_before = self.options.debaters[:place].count(seat)
            calls.append(self.ask(seat, DebateTask(self.problem, own, others), variation=same_seat_before))
            self._debaters[calls[-1].number] = place
        return calls

    def _ask_again(self, call: RoleCall, reply: Unusable) -> list[RoleCall]:
        """Repeat a call after an unusable reply, for the same debater."""
        calls = self.retry(call, reply)
        if call.number in self._debaters:
            place = self._debaters.pop(call.number)
            self._debaters.update((again.number, place) for again in calls)
        return calls

    def _end_round(self) -> list[RoleCall]:
        arguments = [self._said[place] for place in sorted(self._said)]
        answers = [argument.answer for argument in arguments]
        if len(set(answers)) == 1:
            return self._end(answers[0], confirmed=True)
        if self.rounds < self.options.rounds:
            self.rounds += 1
            return self._ask_round()
        if self.options.judge is None:
            return self._end(most_common(answers), confirmed=False)
        self._candidates = list({argument.answer: argument for argument in arguments}.values())
        candidates = tuple(argument.stated() for argument in self._candidates)
        return [self.ask(self.options.judge, JudgeTask(self.problem, candidates))]

    def _end(self, answer: str, confirmed: bool) -> list[RoleCall]:
        self.outcome = Outcome(answer, confirmed, self.rounds)
        return []
