"""Request bodies of OpenAI's API, as far as Troupe supports it. Unsupported keys are rejected by name, not ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from agents.role import Message

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1_000_000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenPrompt = Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

SAMPLING_KEYS = (
    *("presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty"),
    *("min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
)
"""Keys that go to vLLM's SamplingParams unchanged."""


class Body(BaseModel):
    """A part of a request that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    """A text part of a message's content. Other kinds of parts are not supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A chat message. The role `developer` means `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def to_message(self) -> Message:
        """Return the message in the form that engines take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    """Options of a streamed reply."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the token usage.")
    continuous_usage_stats: Literal[False] = False


class JsonSchema(Body):
    """A named JSON schema."""

    name: str = Field(max_length=200)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format that the reply must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema.schema is missing; the type json_schema requires it")
        return self

    @property
    def reply_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the reply, or None for free text."""
        if self.type == "json_schema":
            assert self.json_schema is not None
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class SamplingBody(Body):
    """The keys that chats and completions share: OpenAI's sampling keys, vLLM's, and keys that have no effect."""

    model: str = Field(min_length=1, max_length=200, description="`team`, or the name of one of its seats.")
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=16)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
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
    def _check_seed(cls, seed: int | None, info: ValidationInfo) -> int | None:
        """Reject a seed that is too large for n choices: choice i uses seed + i, which vLLM stores in 64 bits."""
        largest = 2**63 - info.data.get("n", 1)
        if seed is not None and seed > largest:
            raise ValueError(f"must be at most {largest}, so that each of the n choices has its own seed")
        return seed

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Return True if a stream ends with a chunk that holds the token usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self) -> dict[str, Any]:
        """Return the arguments that vLLM's SamplingParams take unchanged."""
        return {name: value for name in SAMPLING_KEYS if (value := getattr(self, name)) is not None}

    def changed_keys(self) -> set[str]:
        """Return the keys that the request sets to something other than their defaults."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name for name in self.model_fields_set if getattr(self, name) != defaults[name]}


class ChatRequest(SamplingBody):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def logprobs_count(self) -> int | None:
        """The number of most likely alternatives to report for each token; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingBody):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | TokenPrompt
        | Annotated[list[TokenPrompt], Field(min_length=1, max_length=64)]
    ) = Field(description="One prompt or a list of prompts, each as text or as token ids.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, each as text or as token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [tuple(prompt)]
        return [text if isinstance(text, str) else tuple(text) for text in prompt]
