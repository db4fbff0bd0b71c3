"""Owns the records of the journal: a job, an event, and the state from which a job resumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.jobs.job import JobState
from runtime.jobs.reply_record import StoredReply
from runtime.jobs.submission import Submission
from runtime.jobs.tool_record import ToolRecord

REPLIED = "replied"
"""The kind of an event that records a reply."""
TOOL_CALLED = "tool called"
"""The kind of an event that records a tool call before the tool runs."""
TOOL_RETURNED = "tool returned"
"""The kind of an event that records the output of a tool call."""
RESTARTED = "anew"
"""The kind of an event after which a job starts from its beginning. The job does not replay earlier replies."""
INTERRUPTED = "the runtime was started anew"
"""The `why` of a QUEUED event for a job that another runtime left RUNNING. Journals hold it, so do not change it."""


@dataclass(frozen=True)
class JobRecord:
    """A job as stored in the journal.

    Times are seconds since 1970. `number` is the order in which jobs were accepted. `attempts` counts the runs of the
    job.
    """

    number: int
    id: str
    state: JobState
    submission: Submission
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    result: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Return the job as JSON for the API and the command line."""
        return {
            "id": self.id,
            "state": str(self.state),
            **self.submission.model_dump(mode="json"),
            "submitted_at": self.submitted_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "attempts": self.attempts,
            "result": self.result,
        }


@dataclass(frozen=True)
class JobEvent:
    """One change to a job. Events are ordered by `id`; `at` is seconds since 1970.

    `kind` is the name of the state that the job entered, or REPLIED, TOOL_CALLED, TOOL_RETURNED or RESTARTED. `data`
    depends on `kind`:

    - a new job: the beginning of its `problem`
    - DONE: the `answer`
    - another end, or another try: the reason, as `why`
    - REPLIED: the fields of ReplyRecord, and the `entries` that the reply added to the transcript
    - TOOL_CALLED: the fields of ToolRecord
    - TOOL_RETURNED: the call's `number`, the `seat`, the `tool`, its `output`, and whether it `failed`
    """

    id: int
    job: str
    at: float
    kind: str
    data: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the event as JSON for the API and the command line."""
        return {"id": self.id, "job": self.job, "at": self.at, "kind": self.kind, **self.data}


@dataclass(frozen=True)
class StartedJob:
    """A job that has just entered RUNNING, the state from which it resumes, and the seconds for which it ran before.

    `replies` holds the replies to replay. `tools` maps the number of each call without a reply to its tool calls.
    """

    record: JobRecord
    replies: Sequence[StoredReply] = ()
    tools: Mapping[int, Sequence[ToolRecord]] = field(default_factory=dict)
    worked_s: float = 0.0
