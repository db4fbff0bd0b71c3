"""What is asked for when a job is submitted, by whichever door; held against its bounds in one place."""

from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from agents.role import Value, explain
from runtime.engines.request import PRIORITY
from runtime.errors import InputError
from runtime.jobs.job import Job
from runtime.jobs.team import PROBLEM_MAX_CHARACTERS

Seconds = Annotated[float, Field(gt=0, le=365 * 86400, allow_inf_nan=False)]


class Submission(Value):
    """One problem, and what is asked of its working.

    Two submissions of the same `idempotency_key` are one job. Of those that wait, for their turn or for an engine,
    `priority` 1 comes first. The job ends by `deadline_s` seconds after it was accepted, within `time_s` seconds of
    work, and makes no further call once it has used `max_tokens`. After an engine's error it is tried again `retries`
    times, from where it was.
    """

    problem: str = Field(min_length=1, max_length=PROBLEM_MAX_CHARACTERS)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=200)
    expected: str | None = Field(default=None, max_length=10_000)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=0, ge=-(2**63), lt=2**63)
    priority: int = Field(default=PRIORITY, ge=1, le=100)
    deadline_s: Seconds | None = None
    time_s: Seconds | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**53)
    retries: int = Field(default=2, ge=0, le=100)

    @classmethod
    def read(cls, data: Any) -> Self:
        """The submission in a JSON value. Raises InputError naming each field and what would be right."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(explain(error)) from None

    def job(self, id: str) -> Job:
        """The job that it asks for."""
        return Job(id, self.problem, self.expected, self.temperature, self.seed, self.max_tokens, self.priority)
