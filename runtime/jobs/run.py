"""Owns what a running job has used so far, and its bounds."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from agents.tool_protocol import ToolUse
from agents.workflow import RoleCall
from runtime.engines.usage import Usage
from runtime.errors import BudgetSpent
from runtime.events import ToolCalled, ToolReturned
from runtime.jobs.job import Job
from runtime.jobs.tool_record import ToolRecord, task_id

CALLS_MAX = 1000
"""The most calls of seats and tools that a job may make, so that no workflow and no model keeps it running for ever."""

ToolLog = Callable[[ToolCalled | ToolReturned], Awaitable[None]]
"""Writes down that a tool is about to be called, or has returned, and returns when that is durable."""


async def no_log(event: ToolCalled | ToolReturned) -> None:
    """Write nothing down: for jobs that no crash resumes."""


@dataclass
class Run:
    """A job that runs: its start on the event loop's clock, and what each seat has used so far.

    `tools` holds the calls of tools of each open call, by the call's number. `earlier_uses` holds those of tries whose
    reply could not be read, by the task, so that the next try does not repeat them.
    """

    job: Job
    since_s: float
    log: ToolLog = no_log
    usage: dict[str, Usage] = field(default_factory=dict)
    calls: int = 0
    tools: dict[int, list[ToolRecord]] = field(default_factory=dict)
    earlier_uses: dict[str, tuple[ToolUse, ...]] = field(default_factory=dict)

    def begin_call(self) -> None:
        """Count a call of a seat or a tool. Raise BudgetSpent if the job has used up its tokens or its calls."""
        used = sum(usage.prompt_tokens + usage.completion_tokens for usage in self.usage.values())
        if self.job.max_tokens is not None and used >= self.job.max_tokens:
            raise BudgetSpent(f"the job has used {used} tokens; its max_tokens is {self.job.max_tokens}")
        if self.calls >= CALLS_MAX:
            raise BudgetSpent(f"the job has made {self.calls} calls of seats and tools, which is the most it may make")
        self.calls += 1

    def add(self, seat: str, used: Usage) -> None:
        """Add what a seat used for a call."""
        self.usage.setdefault(seat, Usage()).add(used)

    def end_call(self, call: RoleCall, tools: Sequence[ToolRecord], readable: bool) -> None:
        """Forget the tools of a call that has a reply. If it was not readable, keep their outputs for the next try."""
        self.tools.pop(call.number, None)
        if tools and not readable:
            uses = tuple(record.use for record in tools if record.use is not None)
            self.earlier_uses[task_id(call)] = (*self.earlier_uses.get(task_id(call), ()), *uses)
