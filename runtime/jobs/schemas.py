"""Jobs as they are shown to others, by HTTP and MQTT alike: the models that their schemas are made from."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.jobs.job import JobState
from runtime.jobs.journal import JobRecord
from runtime.jobs.submission import Submission


class JobView(Submission):
    """A job: what was asked, where it stands, and its result once it has one. Times are seconds since 1970."""

    id: str
    state: JobState
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    result: dict[str, Any] | None

    @classmethod
    def of(cls, record: JobRecord) -> "JobView":
        """A job as the journal has it."""
        return cls.model_validate(record.as_json())


class EventView(BaseModel):
    """What happened to a job, in the order of `id`, at a time in seconds since 1970. `kind` is the state that it has
    come into, or "replied", or "anew": the replies before are not taken again.

    A new job has the beginning of its `problem`, one that is done its `answer`, another end `why`, and a reply the
    call's `number`, `seat`, `reply`, what it `used`, and the `entries` that it added to the transcript.
    """

    model_config = ConfigDict(extra="allow")

    id: int
    job: str
    at: float
    kind: str
