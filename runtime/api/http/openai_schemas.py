"""The bodies of OpenAI's API, as far as they are understood here. What is not is refused by name, not ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from agents.role import Message

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1_000_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stops = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A part of a request; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    """A part of a message's content. Engines here take text alone."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def message(self) -> Message:
        """As engines take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    """`include_usage` adds a last chunk with the usage."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class JsonSchema(Body):
    """A schema by name."""

    name: str = Field(max_length=200)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the reply is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema.schema is missing")
        return self

    @property
    def schema_of_reply(self) -> dict[str, Any] | None:
        """The JSON schema, None for free text."""
        if self.type == "json_schema":
            assert self.json_schema is not None
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class SamplingBody(Body):
    """What both kinds of completion say of sampling: OpenAI's keys, vLLM's beyond them, and those that change nothing
    here."""

    model: str = Field(min_length=1, max_length=200, description="`team`, or a seat of it")
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=16)
    stop: Stops | Annotated[list[Stops], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Token, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(default=None, ge=-1, le=2**31)
    min_p: Probability | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    min_tokens: int | None = Field(default=None, ge=0, le=2**31)
    stop_token_ids: list[Token] | None = Field(default=None, max_length=1024)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("seed")
    @classmethod
    def _seeds_of_all_choices(cls, seed: int | None, info: ValidationInfo) -> int | None:
        """A choice's seed is that of the one before and one more; vLLM's workers hold it in 64 bits."""
        most = 2**63 - info.data.get("n", 1)
        if seed is not None and seed > most:
            raise ValueError(f"has to be at most {most}, so that each of n choices has a seed of its own")
        return seed

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a reply ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def further(self) -> dict[str, Any]:
        """What vLLM's SamplingParams take as it is."""
        names = (
            *("presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty"),
            *("min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def set_keys(self) -> set[str]:
        """The keys that a request gives, those that say what is so anyway left out."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name for name in self.model_fields_set if getattr(self, name) != defaults[name]}


class ChatRequest(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def logprobs_asked(self) -> int | None:
        """How many of the likeliest tokens are asked for beside each, None where no logprobs are."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingBody):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]], Field(max_length=64)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(given)]
        return [one if isinstance(one, str) else tuple(one) for one in given]
