"""Owns what a running job has used so far, and its bounds."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from runtime.engines.usage import Usage
from runtime.errors import BudgetSpent
from runtime.events import ToolCalled, ToolReturned
from runtime.jobs.job import Job

CALLS_MAX = 1000
"""The most calls of seats and tools that a job may make, so that a workflow or a model cannot go on for ever."""

ToolLog = Callable[[ToolCalled | ToolReturned], Awaitable[None]]
"""Writes down that a tool is about to be called, or has returned, and returns when that is durable."""


async def no_log(event: ToolCalled | ToolReturned) -> None:
    """Write nothing down: for jobs that no crash resumes."""


@dataclass
class Run:
    """A job that runs: its start on the event loop's clock, and what each seat has used so far."""

    job: Job
    since_s: float
    log: ToolLog = no_log
    usage: dict[str, Usage] = field(default_factory=dict)
    calls: int = 0

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
