"""The models that are seats of the team: each answers chats and completions with the seat's engine alone."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response

from runtime.api.http import sse
from runtime.api.http.backend import Backend
from runtime.api.http.errors import error_body
from runtime.api.http.merge import merge
from runtime.api.http.openai_answers import AnswerFormat, ChatFormat, CompletionFormat, Reply, usage_of
from runtime.api.http.openai_schemas import ChatRequest, CompletionRequest, SamplingBody
from runtime.engines.request import Chunk, GenerateRequest
from runtime.errors import TroupeError

COMPLETION_MAX_TOKENS = 16
"""The default of /v1/completions in OpenAI's API and in vLLM."""


async def chat(body: ChatRequest, backend: Backend) -> Response:
    """Answer a chat. Raises Busy or EngineError."""
    requests = [_chat_request(body, choice) for choice in range(body.n)]
    return await _answer(body, ChatFormat(body.model), requests, backend)


async def complete(body: CompletionRequest, backend: Backend) -> Response:
    """Continue prompts. Raises Busy or EngineError."""
    requests = [_completion_request(body, prompt, choice) for prompt in body.prompts for choice in range(body.n)]
    return await _answer(body, CompletionFormat(body.model), requests, backend)


def _chat_request(body: ChatRequest, choice: int) -> GenerateRequest:
    return GenerateRequest(
        messages=tuple(message.to_message() for message in body.messages),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        schema=body.response_format.reply_schema if body.response_format else None,
        logprobs=body.logprobs_count,
        **_sampling(body, choice),
    )


def _completion_request(body: CompletionRequest, prompt: str | tuple[int, ...], choice: int) -> GenerateRequest:
    return GenerateRequest(
        messages=(),
        prompt=prompt,
        max_tokens=body.max_tokens or COMPLETION_MAX_TOKENS,
        logprobs=body.logprobs,
        **_sampling(body, choice),
    )


def _sampling(body: SamplingBody, choice: int) -> dict[str, Any]:
    return {
        "request_id": uuid.uuid4().hex,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stop_strings,
        "seed": None if body.seed is None else body.seed + choice,
        "sampling_params": body.sampling_params(),
    }


async def _answer(
    body: SamplingBody, answer: AnswerFormat, requests: list[GenerateRequest], backend: Backend
) -> Response:
    """Return the replies to all requests as the choices of one answer, streamed if the body asks for it."""
    chunks = merge([backend.generate(body.model, request) for request in requests])
    if body.stream:
        return await sse.openai_response(_stream(answer, chunks, len(requests), body.include_usage))
    replies = [Reply() for _ in requests]
    async with aclosing(chunks):
        async for index, chunk in chunks:
            replies[index].append(chunk)
    choices = [answer.choice(index, reply) for index, reply in enumerate(replies)]
    return JSONResponse({**answer.envelope(), "choices": choices, "usage": usage_of(replies)})


async def _stream(
    answer: AnswerFormat, chunks: AsyncGenerator[tuple[int, Chunk], None], choices: int, include_usage: bool
) -> AsyncGenerator[dict[str, Any] | str, None]:
    """Yield the events of a streamed answer with this number of choices.

    Yields nothing until every choice has started: a request that the engine refuses raises its error before the stream
    starts, and so gets an HTTP status of its own. A later error becomes the last event.
    """
    events = _ChunkEvents(answer, choices)
    async with aclosing(chunks):
        held_back = []
        async for index, chunk in chunks:
            held_back.append(events.append(index, chunk))
            if events.all_started():
                break
        for event in held_back:
            yield event
        try:
            async for index, chunk in chunks:
                yield events.append(index, chunk)
        except TroupeError as error:
            yield error_body(error)
            return
    if include_usage:
        yield events.usage()
    yield sse.DONE


class _ChunkEvents:
    """The events of a streamed answer, and the total of each choice so far."""

    def __init__(self, answer: AnswerFormat, choices: int) -> None:
        self._answer = answer
        self._envelope = answer.envelope(streaming=True)
        self._totals = [Reply() for _ in range(choices)]

    def append(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """Add a chunk to a choice and return the event that sends it."""
        part = Reply()
        part.append(chunk)
        first = not self._totals[index].started
        self._totals[index].append(chunk)
        return {**self._envelope, "choices": [self._answer.chunk_choice(index, part, first)]}

    def all_started(self) -> bool:
        return all(total.started for total in self._totals)

    def usage(self) -> dict[str, Any]:
        """Return the event that sends the token usage."""
        return {**self._envelope, "choices": [], "usage": usage_of(self._totals)}
