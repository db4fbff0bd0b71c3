"""A request to an engine, and the chunks in which its reply is streamed."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from agents.role import Message
from runtime.engines.usage import Account

PRIORITY = 5
"""The default priority of a request. 1 is the most urgent."""


COUNTS_THE_REPLY = frozenset(
    {
        "frequency_penalty",
        "presence_penalty",
        "repetition_detection",
        "structured_outputs",
        "thinking_token_budget",
    }
)
"""Arguments of SamplingParams that treat the tokens of the reply differently from the tokens of the prompt."""


@dataclass(frozen=True)
class GenerateRequest:
    """One reply to generate, with its sampling and scheduling parameters.

    Prompt:

    - `messages`: the chat to answer.
    - `rendered`: a prompt that vLLM's renderer has made, with `prompt_token_ids` and, if known, the text `prompt`. If
      it is set, `messages` is ignored.
    - `resume_tokens`: ids of reply tokens that the caller already has, from an engine that died. The stream continues
      after them, and `max_tokens` includes them.
    - `has_begun`: whether the caller already has a part of the reply. An engine that drains serves it to its end.

    Sampling:

    - `temperature`, `top_p`, `stop`: as in vLLM's SamplingParams.
    - `max_tokens`: the most tokens that the reply may have. None allows as many as the model's length leaves.
    - `seed`: the seed for sampling. None leaves sampling random.
    - `schema`: a JSON schema that the reply must match. The reply ends, with the finish reason "repetition", once its
      tokens repeat at length. An empty schema does only that.
    - `logprobs`: how many of the likeliest tokens to report with each reply token. None reports no logprobs.
    - `sampling_params`, `generate_options`: more arguments of vLLM's SamplingParams, and of its AsyncLLM.generate,
      passed on unchanged.

    Scheduling and streaming:

    - `priority`: an engine admits waiting requests with a lower number first. 1 is the most urgent.
    - `since_s`: when the request's job began, on the event loop's clock. Among requests of equal priority, the one
      whose job began first is admitted first. None counts from when the engine receives the request.
    - `stream_interval`: tokens per chunk. The first and the last token are streamed immediately in any case.
    - `session`: requests of one session begin with much the same prompt, so a replica that served one of them has a
      part of the next one's KV cache.
    - `trace_headers`: the W3C headers of the span that the request belongs to. An engine whose vLLM traces requests
      makes its own span a child of it.
    - `account`: takes what the request is charged.

    Admission by job age lets the later calls of a job overtake the first calls of younger jobs. Admission by arrival
    would make every call of a job wait behind all other jobs, so that under load all jobs end late (Autellix,
    arXiv 2502.13965).
    """

    request_id: str
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    resume_tokens: tuple[int, ...] = ()
    has_begun: bool = False
    rendered: Mapping[str, Any] | None = None
    logprobs: int | None = None
    priority: int = PRIORITY
    since_s: float | None = None
    stream_interval: int = 1
    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    generate_options: Mapping[str, Any] = field(default_factory=dict)
    session: str | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    account: Account = field(default_factory=Account, compare=False, repr=False)

    @property
    def resumable(self) -> bool:
        """Return True if another engine can continue the reply with its first tokens appended to the prompt.

        A schema's grammar and the parameters in COUNTS_THE_REPLY would treat those tokens as part of the prompt. With
        stop strings, vLLM holds back the last characters of its tokens, so the text would have a gap.
        """
        return self.schema is None and not self.stop and not COUNTS_THE_REPLY & self.sampling_params.keys()

    def rank(self, now_s: float) -> int:
        """Return the request's vLLM priority: the lowest is admitted first, the highest is preempted first.

        `now_s` is the time on the event loop's clock. It stands in for a missing `since_s`.
        """
        return (self.priority << 44) + int(1000 * (now_s if self.since_s is None else self.since_s))


@dataclass(frozen=True)
class Chunk:
    """The text and token ids that were added to a reply since the previous chunk.

    - `time_s`: when they arrived, by time.monotonic.
    - `prompt_tokens`: the length of the prompt, without `GenerateRequest.resume_tokens`.
    - `finish`: None until the last chunk, which carries vLLM's finish reason ("stop", "length").
    - `stop`: the stop string or the stop token that ended the reply, if one of the request's did.
    - `logprobs`: one entry per token if the request asked for logprobs, otherwise empty. It holds vLLM's Logprob of the
      token and of its likeliest alternatives by token id.
    - `cached_tokens`: the tokens of the prompt that were in the prefix cache; None if that is not known.
    """

    text: str
    token_ids: tuple[int, ...]
    time_s: float
    prompt_tokens: int
    finish: str | None = None
    stop: int | str | None = None
    logprobs: tuple[Mapping[int, Any], ...] = ()
    cached_tokens: int | None = None


class Engine(Protocol):
    """A generator of replies: one engine, or all replicas of one."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply to a request. Closing the generator early aborts the request."""
