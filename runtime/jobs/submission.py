"""The fields of a submitted job and their bounds. HTTP, MQTT and Python submit the same model with the same bounds."""

from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from agents.role import Value, explain
from runtime.engines.request import PRIORITY
from runtime.errors import InputError
from runtime.jobs import comparison
from runtime.jobs.comparison import Comparison
from runtime.jobs.job import Job
from runtime.jobs.team import PROBLEM_MAX_CHARACTERS

Seconds = Annotated[float, Field(gt=0, le=365 * 86400, allow_inf_nan=False)]


class Submission(Value):
    """A problem to be worked as a job, and the job's limits.

    Submissions with the same `idempotency_key` are one job. Jobs of `priority` 1 are served first, both in the queue
    and by the engines. `expected` is the right answer, which the result is compared with, and `compare` says how.
    Without `compare`, a number is compared as a number, and any other answer as text. `temperature` overrides that of
    every seat; `seed` makes sampling repeatable.

    The job ends at the latest `deadline_s` seconds after it was accepted, and after `time_s` seconds of work. Once it
    has used `max_tokens`, it makes no further call. After an engine's error it is tried again up to `retries` times,
    from its last reply on.
    """

    problem: str = Field(min_length=1, max_length=PROBLEM_MAX_CHARACTERS)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=200)
    expected: str | None = Field(default=None, max_length=10_000)
    compare: Comparison | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=0, ge=-(2**63), lt=2**63)
    priority: int = Field(default=PRIORITY, ge=1, le=100)
    deadline_s: Seconds | None = None
    time_s: Seconds | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**53)
    retries: int = Field(default=2, ge=0, le=100)

    @field_validator("compare")
    @classmethod
    def _fits_expected(cls, compare: Comparison | None, info: ValidationInfo) -> Comparison | None:
        if compare is None or "expected" not in info.data:  # a wrong `expected` is reported by itself
            return compare
        if fault := comparison.fault(info.data["expected"], compare):
            raise PydanticCustomError("comparison", "{fault}", {"fault": fault})
        return compare

    @classmethod
    def read(cls, data: Any) -> Self:
        """Return the submission in a JSON value. Raises InputError that names each wrong field and what is allowed."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(explain(error, "the submission")) from None

    def job(self, id: str) -> Job:
        """Return the job that this submission asks for."""
        return Job(
            id,
            self.problem,
            self.expected,
            self.temperature,
            self.seed,
            self.max_tokens,
            self.priority,
            self.compare,
        )
