"""Owns the state of a running job: its usage, its tool calls, and its limits."""

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
"""The most calls of seats and tools that a job may make. The limit ends jobs whose workflow or model never stops."""

ToolLog = Callable[[ToolCalled | ToolReturned], Awaitable[None]]
"""Records the start or the end of a tool call, and returns when the record is durable."""


async def no_log(event: ToolCalled | ToolReturned) -> None:
    """Record nothing, for jobs that do not resume after a crash."""


@dataclass
class Run:
    """A running job: its start on the event loop's clock, and each seat's usage so far.

    `tools` maps the number of each open call to the call's tool calls. `earlier_uses` maps the `task_id` of a call to
    the tool calls of its tries with an unusable reply, so that the next try does not repeat them.
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
        """Add the usage of a call to the usage of its seat."""
        self.usage.setdefault(seat, Usage()).add(used)

    def end_call(self, call: RoleCall, tools: Sequence[ToolRecord], readable: bool) -> None:
        """Forget the tool calls of a call that has a reply. If the reply is unusable, keep them for the next try."""
        self.tools.pop(call.number, None)
        if tools and not readable:
            uses = tuple(record.use for record in tools if record.use is not None)
            self.earlier_uses[task_id(call)] = (*self.earlier_uses.get(task_id(call), ()), *uses)
