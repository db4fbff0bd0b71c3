"""OpenAI's API: `team` runs a job, whose deliberation streams as reasoning before its answer; the name of a seat is
that seat's engine, for whatever agents others put on it."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from runtime.api.http import sse
from runtime.api.http.auth import Scope, may
from runtime.api.http.backend import Backend, Backing
from runtime.api.http.connection import unless_gone
from runtime.api.http.errors import ERRORS, JobFailed, error_body
from runtime.api.http.openai_schemas import ChatRequest, CompletionRequest, SamplingBody
from runtime.engines.request import Chunk, GenerateRequest, TokenLogprob
from runtime.errors import InputError, NotFound, TroupeError
from runtime.jobs.job import JobState
from runtime.jobs.journal.records import JobEvent
from runtime.jobs.submission import Submission

TEAM = "team"
router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)
_ASKS = [Depends(may(Scope.SUBMIT))]
_OF_THE_TEAM = {"model", "messages", "temperature", "seed", "stream", "stream_options", "user", "metadata", "store"}
"""What a request to the team may say; its seats have their own ideas of the rest."""


@router.get("/models", dependencies=[Depends(may(Scope.READ))])
async def models(backing: Backing) -> dict[str, Any]:
    """The team, and each of its seats."""
    return {"object": "list", "data": [_model(backing, name) for name in (TEAM, *backing.team.seats)]}


@router.get("/models/{model}", dependencies=[Depends(may(Scope.READ))])
async def model(model: str, backing: Backing) -> dict[str, Any]:
    """One of them."""
    _known(backing, model)
    return _model(backing, model)


@router.post("/chat/completions", dependencies=_ASKS, response_model=None)
async def chat(body: ChatRequest, request: Request, backing: Backing) -> Response:
    """A chat with a seat's engine; or a problem for the team."""
    _known(backing, body.model)
    if body.model == TEAM:
        return await unless_gone(request, _team(body, backing))
    requests = [_chat_request(body, choice) for choice in range(body.n)]
    return await unless_gone(request, _answer(body, _Chat(body), requests, backing))


@router.post("/completions", dependencies=_ASKS, response_model=None)
async def complete(body: CompletionRequest, request: Request, backing: Backing) -> Response:
    """Text that goes on from a prompt, by a seat's engine."""
    _known(backing, body.model)
    if body.model == TEAM:
        raise InputError("model: the team works problems, by /v1/chat/completions; prompts go to one of its seats")
    requests = [_completion_request(body, prompt, choice) for prompt in body.prompts for choice in range(body.n)]
    return await unless_gone(request, _answer(body, _Completion(body), requests, backing))


def _known(backing: Backend, name: str) -> None:
    if name != TEAM and name not in backing.team.seats:
        raise NotFound(f"there is no model {name!r}; there are {', '.join((TEAM, *backing.team.seats))}")


def _model(backing: Backend, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "troupe"}
    if name != TEAM:
        entry["root"] = backing.config.engines[backing.team.seats[name].engine].model
    return entry


def _chat_request(body: ChatRequest, choice: int) -> GenerateRequest:
    return GenerateRequest(
        messages=tuple(message.message for message in body.messages),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        schema=body.response_format.schema_of_reply if body.response_format else None,
        logprobs=body.logprobs_asked,
        **_sampling(body, choice),
    )


def _completion_request(body: CompletionRequest, prompt: str | tuple[int, ...], choice: int) -> GenerateRequest:
    # 16 is OpenAI's default for completions, and vLLM's
    return GenerateRequest(
        messages=(),
        prompt=prompt,
        max_tokens=body.max_tokens or 16,
        logprobs=body.logprobs,
        **_sampling(body, choice),
    )


def _sampling(body: SamplingBody, choice: int) -> dict[str, Any]:
    return {
        "request_id": uuid.uuid4().hex,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stops,
        "seed": None if body.seed is None else body.seed + choice,
        "further": body.further,
    }


async def _answer(body: SamplingBody, form: "_Form", requests: list[GenerateRequest], backing: Backend) -> Response:
    """The replies to all requests, each a choice of the answer: at once, or as they come."""
    pieces = _together([backing.generate(body.model, request) for request in requests])
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await sse.response(_streamed(form, pieces, len(requests), usage))
    replies = [_Reply() for _ in requests]
    async with aclosing(pieces):
        async for index, chunk in pieces:
            replies[index].add(chunk)
    choices = [form.choice(index, reply) for index, reply in enumerate(replies)]
    return JSONResponse({**form.head(), "choices": choices, "usage": _usage(replies)})


@dataclass
class _Reply:
    """A reply put together, or a piece of it."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    begun: bool = False

    def add(self, chunk: Chunk) -> None:
        self.begun = True
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.prompt_tokens = chunk.prompt_tokens
        self.completion_tokens += len(chunk.token_ids)
        self.finish = chunk.finish


async def _together(replies: list[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield the chunks of all replies as they come, each with the index of its reply.

    The first failure is raised. After it, or if this generator is closed early, the other replies are closed too, which
    aborts their requests.
    """
    if len(replies) == 1:  # the usual case, without tasks in between
        async with aclosing(replies[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    ready: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def pump(index: int, reply: AsyncGenerator[Chunk, None]) -> None:
        async with aclosing(reply) as chunks:
            async for chunk in chunks:
                ready.put_nowait((index, chunk))

    async def pump_all() -> None:
        async with asyncio.TaskGroup() as group:
            for index, reply in enumerate(replies):
                group.create_task(pump(index, reply), name=f"choice {index}")

    pumping = asyncio.create_task(pump_all(), name="choices")
    pumping.add_done_callback(lambda _: ready.put_nowait(None))
    try:
        while (item := await ready.get()) is not None:
            yield item
        try:
            pumping.result()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    finally:
        pumping.cancel()
        await asyncio.wait([pumping])


async def _streamed(
    form: "_Form", pieces: AsyncGenerator[tuple[int, Chunk], None], count: int, usage: bool
) -> AsyncGenerator[dict[str, Any] | str, None]:
    """Yield the events of a stream of `count` choices.

    Nothing is yielded before every choice has begun: a request that is refused is refused before a stream is begun.
    """
    head = form.head(streaming=True)
    totals = [_Reply() for _ in range(count)]

    def event(index: int, chunk: Chunk) -> dict[str, Any]:
        piece = _Reply()
        piece.add(chunk)
        first = not totals[index].begun
        totals[index].add(chunk)
        return {**head, "choices": [form.piece(index, piece, first)]}

    async with aclosing(pieces):
        early = []
        async for index, chunk in pieces:
            early.append(event(index, chunk))
            if all(total.begun for total in totals):
                break
        for one in early:
            yield one
        try:
            async for index, chunk in pieces:
                yield event(index, chunk)
        except TroupeError as error:
            yield error_body(error)
            return
    if usage:
        yield {**head, "choices": [], "usage": _usage(totals)}
    yield sse.DONE


def _usage(replies: Sequence[_Reply]) -> dict[str, int]:
    prompt = sum(reply.prompt_tokens for reply in replies)
    completion = sum(reply.completion_tokens for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Form:
    """How an answer is put, whole or in pieces."""

    name: str
    pieces: str
    prefix: str

    def __init__(self, body: SamplingBody) -> None:
        self._model = body.model
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def head(self, streaming: bool = False) -> dict[str, Any]:
        """What every object of an answer begins with."""
        kind = self.pieces if streaming else self.name
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def choice(self, index: int, reply: _Reply) -> dict[str, Any]:
        """A whole reply."""
        raise NotImplementedError

    def piece(self, index: int, reply: _Reply, first: bool) -> dict[str, Any]:
        """A piece of one."""
        raise NotImplementedError


class _Chat(_Form):
    name = "chat.completion"
    pieces = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, reply: _Reply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text}
        return {"index": index, "message": message, **self._rest(reply)}

    def piece(self, index: int, reply: _Reply, first: bool) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if first else {}), "content": reply.text}
        return {"index": index, "delta": delta, **self._rest(reply)}

    def _rest(self, reply: _Reply) -> dict[str, Any]:
        logprobs = {"content": [_chat_logprob(one) for one in reply.logprobs]} if reply.logprobs else None
        return {"logprobs": logprobs, "finish_reason": reply.finish}


class _Completion(_Form):
    name = pieces = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: SamplingBody) -> None:
        super().__init__(body)
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, reply: _Reply) -> dict[str, Any]:
        return self.piece(index, reply, True)

    def piece(self, index: int, reply: _Reply, first: bool) -> dict[str, Any]:
        logprobs = self._logprobs(index, reply) if reply.logprobs else None
        return {"index": index, "text": reply.text, "logprobs": logprobs, "finish_reason": reply.finish}

    def _logprobs(self, index: int, reply: _Reply) -> dict[str, Any]:
        offsets = []
        for one in reply.logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(one.text)
        return {
            "tokens": [one.text for one in reply.logprobs],
            "token_logprobs": [one.logprob for one in reply.logprobs],
            "top_logprobs": [dict(one.top) for one in reply.logprobs],
            "text_offset": offsets,
        }


def _chat_logprob(one: TokenLogprob) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**entry(one.text, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}


async def _team(body: ChatRequest, backing: Backend) -> Response:
    """A job of the team. Whoever goes away before its end cancels it."""
    if foreign := body.set_keys() - _OF_THE_TEAM:
        raise InputError(f"{min(foreign)}: the team does not take it; a seat of it, such as {_a_seat(backing)}, does")
    if [message.role for message in body.messages] != ["user"]:
        raise InputError("messages: the team takes one message, of the role user: the problem")
    problem = body.messages[0].message.content
    record, _ = await backing.jobs.submit(
        Submission.read({"problem": problem, "temperature": body.temperature, "seed": body.seed})
    )
    form = _Chat(body)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await sse.response(_job_streamed(form, record.id, backing, usage))
    reasoning: list[str] = []
    with _cancelled_if_left(record.id, backing):
        async with aclosing(backing.jobs.feed.follow_job(record.id)) as events:
            async for event in events:
                reasoning += _lines(event)
    result = await _result(record.id, backing)
    message = {"role": "assistant", "reasoning": "".join(reasoning), "content": result["answer"]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return JSONResponse({**form.head(), "job": record.id, "choices": [choice], "usage": _job_usage(result)})


async def _job_streamed(
    form: _Form, job: str, backing: Backend, usage: bool
) -> AsyncGenerator[dict[str, Any] | str, None]:
    head = {**form.head(streaming=True), "job": job}

    def piece(finish: str | None = None, **delta: str) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    with _cancelled_if_left(job, backing):
        yield piece(role="assistant", content="")
        async with aclosing(backing.jobs.feed.follow_job(job)) as events:
            async for event in events:
                for line in _lines(event):
                    yield piece(reasoning=line)
    try:
        result = await _result(job, backing)
    except TroupeError as error:
        yield error_body(error)
        return
    yield piece(content=result["answer"])
    yield piece(finish="stop")
    if usage:
        yield {**head, "choices": [], "usage": _job_usage(result)}
    yield sse.DONE


@contextmanager
def _cancelled_if_left(job: str, backing: Backend) -> Iterator[None]:
    """Cancel a job if whoever waits for it leaves before its end."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        backing.jobs.cancel_soon(job)
        raise


def _lines(event: JobEvent) -> list[str]:
    """What a reply adds to the reasoning."""
    marks: dict[str | None, Callable[[str], str]] = {"accepted": lambda s: f"{s} ✓", "rejected": lambda s: f"{s} ✗"}
    return [
        marks.get(entry["verdict"], str)(f"{entry['role']}: {entry['input']} → {entry['output']}") + "\n"
        for entry in event.data.get("entries", ())
    ]


async def _result(job: str, backing: Backend) -> dict[str, Any]:
    record = await backing.jobs.get(job)
    if record is None or record.state is not JobState.DONE or record.result is None:
        state = record.state if record else "forgotten"
        why = (record.result or {}).get("error") if record else None
        raise JobFailed(f"job {job} is {state}{f': {why}' if why else ''}")
    return record.result


def _job_usage(result: dict[str, Any]) -> dict[str, int]:
    seats = result["usage"].values()
    return _usage([_Reply("", (), used["prompt_tokens"], used["completion_tokens"]) for used in seats])


def _a_seat(backing: Backend) -> str:
    return repr(next(iter(backing.team.seats)))
