"""The workflow `pipeline`."""

from collections import Counter
from collections.abc import Iterator, Mapping

from pydantic import Field

from agents.names import nearest
from agents.role import Reply, Role, Task, Value, as_text
from agents.tasks import Text, WriteTask
from agents.workflow import Outcome, RoleCall, Unusable, Workflow, wrong_type


class Pipeline(Workflow):
    """A pipeline: an ordered list of seats. Each seat reads what the seats before it wrote.

    The answer is the property `answer` of the last reply, or the whole text if the reply has no such property.
    """

    class Options(Value):
        """The settings of `pipeline`."""

        seats: tuple[str, ...] = Field(
            min_length=1, max_length=1000, description="Seats in the order in which they work. A seat can occur again."
        )

    options: Options

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        assert isinstance(options, Pipeline.Options)
        return dict.fromkeys(options.seats, (WriteTask,))

    @classmethod
    def misfits(cls, options: Value, roles: Mapping[str, Role]) -> Iterator[str]:
        assert isinstance(options, Pipeline.Options)
        known: list[str] = []
        owners: dict[str, str] = {}
        for seat in options.seats:
            for name in roles[seat].needs:
                if name not in known:
                    yield (
                        f"team.{seat}.role: it needs {name!r}, which no seat before it in the pipeline gives; "
                        f"{nearest(name, known)}"
                    )
            for name in roles[seat].gives:
                if name in options.seats or owners.setdefault(name, seat) != seat:
                    yield (
                        f"team.{seat}.role: it gives {name!r}, which is also a seat, or given by another one; rename it"
                    )
            known += [seat, *roles[seat].gives]

    def __init__(self, problem: str, options: Value) -> None:
        super().__init__(problem, options)
        self._next = 0
        self._results: dict[str, str] = {}

    def begin(self) -> list[RoleCall]:
        return self._ask_next()

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        if isinstance(reply, Unusable):
            return self.retry(call, reply)
        if not isinstance(reply, Text):
            raise wrong_type(call.task, reply)
        self.record(call, reply)
        self._results |= {call.seat: reply.text, **{name: as_text(value) for name, value in reply.values.items()}}
        if self._next < len(self.options.seats):
            return self._ask_next()
        self.outcome = Outcome(as_text(reply.values.get("answer")) or reply.text, None, self.rounds)
        return []

    def ahead(self) -> Mapping[str, int]:
        return {} if self.outcome else Counter(self.options.seats[self._next :])

    def _ask_next(self) -> list[RoleCall]:
        seat = self.options.seats[self._next]
        self._next += 1
        return [self.ask(seat, WriteTask(self.problem, dict(self._results)))]
