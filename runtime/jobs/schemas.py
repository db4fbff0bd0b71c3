"""Owns how HTTP and MQTT show jobs and events: pydantic models, from which the published schemas are made."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.jobs.job import JobState
from runtime.jobs.journal.records import JobRecord
from runtime.jobs.submission import Submission


class JobView(Submission):
    """A job: its submission, its state, and its result once it has ended. Times are seconds since 1970."""

    id: str
    state: JobState
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    result: dict[str, Any] | None

    @classmethod
    def of(cls, record: JobRecord) -> "JobView":
        """Return the view of a job in the journal."""
        return cls.model_validate(record.as_json())


class EventView(BaseModel):
    """One change to a job. Events are ordered by `id`; `at` is seconds since 1970.

    `kind` is the state that the job entered, or "replied" (a seat replied), "tool called" and "tool returned" (a seat's
    model used a tool), or "anew" (the job starts from its beginning, and its earlier replies no longer count).

    Further fields depend on the kind. "queued" has the beginning of the `problem` if the job is new, "done" has the
    `answer`, and every other end has `why`. "replied" has the call's `number`, the `seat`, the `reply`, what it `used`,
    the `entries` that it added to the transcript, and a `note` if it ended early. "tool called" has the call's
    `number`, the `seat`, the `tool`, its `arguments`, the model's `text` and what it `used`; "tool returned" has the
    `output`, and whether the call `failed`.
    """

    model_config = ConfigDict(extra="allow")

    id: int
    job: str
    at: float
    kind: str
