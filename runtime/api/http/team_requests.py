"""Request bodies for the model `team`. It takes a problem, and few of the keys that OpenAI's API has."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import InputError
from runtime.jobs.submission import Submission

TEAM = "team"
"""The name of the model that is the whole team."""
Text = Annotated[str, Field(max_length=1_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Part):
    """A text part of a message's content. Other kinds of parts are not supported."""

    type: Literal["text", "input_text"]
    text: Text


class ProblemMessage(_Part):
    """A message that states the problem."""

    role: Literal["user"] = Field(description="The team takes one message, the problem, with the role `user`.")
    content: Text | list[TextPart]
    type: Literal["message"] = "message"
    name: str | None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Part):
    """Options of a streamed answer."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the token usage.")


class TeamRequest(BaseModel, ABC):
    """The keys that all requests to the team may have. The team's seats set all other sampling themselves."""

    model: Literal["team"]
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False
    n: Literal[1] | None = Field(default=None, description="No effect.")
    user: str | None = Field(default=None, description="No effect.")
    metadata: dict[str, Any] | None = Field(default=None, description="No effect.")
    store: bool | None = Field(default=None, description="No effect.")

    @classmethod
    def read(cls, body: Mapping[str, Any], a_seat: str) -> Self:
        """Return the request in a body. Raises InputError or RequestValidationError, which name the field.

        `a_seat` is a seat that an error may recommend.
        """
        for key in sorted(body.keys() - cls.model_fields.keys()):
            if body[key] not in (None, False, []):
                raise InputError(f"{key}: the model `{TEAM}` does not support it; its seats, such as {a_seat!r}, do")
        try:
            return cls.model_validate(dict(body))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None

    @property
    @abstractmethod
    def problem(self) -> str:
        """The problem. Raises InputError if the request does not have exactly one."""

    def submission(self) -> Submission:
        """Return the job for this request. Raises InputError."""
        return Submission.read({"problem": self.problem, "temperature": self.temperature, "seed": self.seed})


class TeamChat(TeamRequest):
    """The body of POST /v1/chat/completions for the model `team`."""

    messages: list[ProblemMessage] = Field(min_length=1, max_length=10_000)
    stream_options: StreamOptions | None = None

    @property
    def problem(self) -> str:
        return _only(self.messages, "messages")

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a chunk that holds the token usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TeamResponse(TeamRequest):
    """The body of POST /v1/responses for the model `team`."""

    input: Text | Annotated[list[ProblemMessage], Field(min_length=1, max_length=10_000)]

    @property
    def problem(self) -> str:
        return self.input if isinstance(self.input, str) else _only(self.input, "input")


def _only(messages: list[ProblemMessage], field: str) -> str:
    if len(messages) != 1:
        raise InputError(f"{field}: the model `{TEAM}` takes exactly one message: the problem, with the role `user`")
    return messages[0].text
