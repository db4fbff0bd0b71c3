"""A request to an engine, and the chunks in which its reply is streamed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agents.role import Message

PRIORITY = 5
"""A request's, where none is given; 1 is the most urgent."""


COUNTS_THE_REPLY = frozenset(
    {
        "frequency_penalty",
        "presence_penalty",
        "repetition_detection",
        "structured_outputs",
        "thinking_token_budget",
    }
)
"""Arguments of SamplingParams whose effect depends on which of the tokens before the next one are the reply's."""


@dataclass(frozen=True)
class GenerateRequest:
    """One chat to be answered, or, where there is a `prompt`, that to be gone on with: a text, or tokens.

    `max_tokens` None leaves it at what the model's length leaves. `schema` holds the reply to a JSON schema; `seed`
    None leaves sampling to chance; `logprobs` asks for those of so many of the likeliest tokens beside each one
    written. The reply's first token and last come as they are written, those between them so many together as
    `stream_interval` says. `further` are further arguments of vLLM's SamplingParams, as they are.

    Of the requests that wait, those of `priority` 1 are served first, and of equal ones that whose job began first:
    `since_s` on the loop's clock, None for one that stands alone and begins as it comes. So a job's later calls come
    before the first ones of jobs that began after it. Served as they come, every call of a job would wait behind all
    jobs, and where there is a queue all would be late together (as Autellix has it, arXiv 2502.13965).

    `given` are tokens of the reply that the caller has already, from an engine that died: what is streamed goes on
    after them, and `max_tokens` counts them.
    """

    request_id: str
    messages: tuple[Message, ...]
    temperature: float
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    given: tuple[int, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    logprobs: int | None = None
    priority: int = PRIORITY
    since_s: float | None = None
    stream_interval: int = 1
    further: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resumable(self) -> bool:
        """Whether the rest of a reply follows from the tokens that were written, put behind the prompt. A grammar, and
        what counts the tokens of the reply, start anew with each request."""
        return self.schema is None and not COUNTS_THE_REPLY & self.further.keys()

    def rank(self, now_s: float) -> int:
        """The less, the sooner it is served; where memory is short, that with the highest gives way."""
        return (self.priority << 44) + int(1000 * (now_s if self.since_s is None else self.since_s))


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written, its logarithmic probability, and the likeliest in its place, the likeliest first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """Tokens as they come: text and ids since the last chunk, and when they came (time.monotonic seconds).

    `finish` is None until the last chunk, then vLLM's finish reason ("stop", "length"). `logprobs`, one a token, where
    they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    time_s: float
    prompt_tokens: int
    finish: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
