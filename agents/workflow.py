"""The contract of a workflow: a state machine that decides which seat to ask next.

A Workflow object belongs to one problem. `begin` and `take` return the calls to make next. Any number of calls can be
open at once. When no call is open, `outcome` is set. A workflow uses no clock, no I/O and no randomness, so the same
replies in the same order lead to the same state. The runtime resumes a job by giving its recorded replies to a new
Workflow.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from agents.role import Reply, Role, Task, Value

UNUSABLE_MAX = 3
"""A problem fails after this many unusable replies to one call."""


@dataclass(frozen=True)
class RoleCall:
    """One task for one seat of the team.

    `number` identifies the call within its workflow. If `variation` is above 0, the engine samples the reply at a
    higher temperature, so that replies differ. `retries` counts the unusable replies to this call so far.
    """

    number: int
    seat: str
    task: Task
    variation: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Unusable:
    """The result of a call that has no usable reply. `why` is the reason."""

    why: str


@dataclass
class Entry:
    """One line of the transcript: a task of a seat and the reply, or a tool call of the seat's model and its output.

    `verdict` is None until a critic judges the output, and then "accepted" or "rejected". For a tool call that failed,
    `verdict` is "failed". `round` counts the revisions of the step before this entry. For an unusable reply, `round`
    counts the tries before this one. If a reply ended early, `note` says why.
    """

    seat: str
    input: str
    output: str
    verdict: str | None = None
    round: int = 0
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The end of a problem: an answer, or the reason for which there is no answer.

    `confirmed` is True if the critics accepted every step, False if the result of some step stayed rejected, and None
    if no critic judged anything. `rounds` is the highest number of revisions of any step. If `answer` is None,
    `failure` says why. If a judge compared the answer with the expected answer, `correct` is the judge's verdict.
    """

    answer: str | None
    confirmed: bool | None
    rounds: int
    failure: str | None = None
    correct: bool | None = None


class Workflow(ABC):
    """The base class of workflows. An object holds the state of one problem.

    `Options` describes the workflow's settings in a configuration. Users see `transcript` and `outcome`. Subclasses
    create the calls that `begin` and `take` return with `ask`, `retry` and `fail`, and add to the transcript with
    `record`.
    """

    class Options(Value):
        """The settings of a workflow. The default is no settings."""

    def __init__(self, problem: str, options: Value) -> None:
        self.problem = problem
        self.options = options
        self.transcript: list[Entry] = []
        self.outcome: Outcome | None = None
        self.rounds = 0
        self._last_number = 0

    @classmethod
    @abstractmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        """Return the seats that the workflow calls, and the kinds of task that each seat's role must take."""

    @classmethod
    def misfits(cls, options: Value, roles: Mapping[str, Role]) -> Iterator[str]:
        """Yield further faults of the roles at the seats. Each fault begins with a key of the form `team.<seat>...`."""
        yield from ()

    @abstractmethod
    def begin(self) -> list[RoleCall]:
        """Return the first calls."""

    @abstractmethod
    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        """Accept the reply to an open call and return the calls to make next.

        `reply` has the task's `reply_type`, or is Unusable.
        """

    def ahead(self) -> Mapping[str, int] | None:
        """Return how many calls of each seat are certain to follow the open calls, or None if that is unknown.

        The controller moves memory to the engines of these seats before the workflow makes the calls.
        """
        return None

    def ask(self, seat: str, task: Task, variation: int = 0) -> RoleCall:
        """Return a new call, for `begin` or `take` to return."""
        self._last_number += 1
        return RoleCall(self._last_number, seat, task, variation)

    def record(self, call: RoleCall, reply: Reply, verdict: str | None = None, revisions: int = 0) -> Entry:
        """Append a reply to the transcript and return its entry. `revisions` counts the step's revisions so far."""
        entry = Entry(call.seat, str(call.task), str(reply), verdict, revisions)
        self.transcript.append(entry)
        return entry

    def retry(self, call: RoleCall, reply: Unusable) -> list[RoleCall]:
        """Return the same call again after an unusable reply. After the last try, fail the problem."""
        self.transcript.append(Entry(call.seat, str(call.task), f"unusable: {reply.why}", "rejected", call.retries))
        if call.retries + 1 >= UNUSABLE_MAX:
            return self.fail(f"the {call.seat}'s reply could not be read {UNUSABLE_MAX} times: {reply.why}")
        self._last_number += 1
        return [replace(call, number=self._last_number, variation=call.variation + 1, retries=call.retries + 1)]

    def fail(self, why: str) -> list[RoleCall]:
        """End the problem without an answer, unless the problem has ended already. Return no calls."""
        self.outcome = self.outcome or Outcome(None, None, self.rounds, why)
        return []


def wrong_type(task: Task, reply: object) -> TypeError:
    """Return the error for a reply whose type is not the task's `reply_type`."""
    return TypeError(
        f"the reply to {type(task).__name__} must be {task.reply_type.__name__}, not {type(reply).__name__}"
    )
