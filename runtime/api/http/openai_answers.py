"""Response objects of OpenAI's API: complete answers, the chunks of streamed ones, log probabilities and usage."""

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from runtime.engines.request import Chunk, TokenLogprob


@dataclass
class Reply:
    """A reply, or a part of one, put together from chunks."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    started: bool = False

    def append(self, chunk: Chunk) -> None:
        """Add a chunk to the reply."""
        self.started = True
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.prompt_tokens = chunk.prompt_tokens
        self.completion_tokens += len(chunk.token_ids)
        self.finish_reason = chunk.finish


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_of(replies: list[Reply]) -> dict[str, int]:
    """Return the usage object of an answer with these replies as its choices."""
    return usage(sum(reply.prompt_tokens for reply in replies), sum(reply.completion_tokens for reply in replies))


class AnswerFormat(ABC):
    """The format of one answer: its id, its kind of objects, and the form of its choices."""

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def envelope(self, streaming: bool = False) -> dict[str, Any]:
        """Return the keys that every object of the answer starts with."""
        name = self.chunk_object_name if streaming else self.object_name
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}

    @abstractmethod
    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """Return a complete choice."""

    @abstractmethod
    def chunk_choice(self, index: int, part: Reply, first: bool) -> dict[str, Any]:
        """Return a part of a choice; `first` if it is the choice's first part."""


class ChatFormat(AnswerFormat):
    """The format of /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text}
        return {"index": index, "message": message, **self._common_keys(reply)}

    def chunk_choice(self, index: int, part: Reply, first: bool) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if first else {}), "content": part.text}
        return {"index": index, "delta": delta, **self._common_keys(part)}

    def _common_keys(self, reply: Reply) -> dict[str, Any]:
        logprobs = {"content": [_chat_logprob(token) for token in reply.logprobs]} if reply.logprobs else None
        return {"logprobs": logprobs, "finish_reason": reply.finish_reason}


class CompletionFormat(AnswerFormat):
    """The format of /v1/completions."""

    object_name = chunk_object_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._text_offsets: dict[int, int] = {}

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        return self.chunk_choice(index, reply, first=True)

    def chunk_choice(self, index: int, part: Reply, first: bool) -> dict[str, Any]:
        logprobs = self._logprobs(index, part) if part.logprobs else None
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def _logprobs(self, index: int, part: Reply) -> dict[str, Any]:
        """Return the log probabilities of a part; text offsets continue after the choice's earlier parts."""
        offsets = []
        for token in part.logprobs:
            offsets.append(self._text_offsets.get(index, 0))
            self._text_offsets[index] = offsets[-1] + len(token.text)
        return {
            "tokens": [token.text for token in part.logprobs],
            "token_logprobs": [token.logprob for token in part.logprobs],
            "top_logprobs": [dict(token.top) for token in part.logprobs],
            "text_offset": offsets,
        }


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    alternatives = [_chat_token(text, logprob) for text, logprob in token.top]
    return {**_chat_token(token.text, token.logprob), "top_logprobs": alternatives}


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
