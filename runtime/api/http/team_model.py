"""The model `team`: a request to it is a job. The team's deliberation is the reasoning, its result the text."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from fastapi.responses import JSONResponse, Response

from runtime.api.http import sse
from runtime.api.http.backend import Backend
from runtime.api.http.errors import JobFailed, error_body
from runtime.api.http.team_requests import TeamChat, TeamRequest, TeamResponse
from runtime.errors import TroupeError
from runtime.jobs.job import JobState
from runtime.jobs.journal.records import JobEvent

_MARKS = {"accepted": " ✓", "rejected": " ✗"}


async def chat(body: TeamChat, backend: Backend) -> Response:
    """Run a job for the problem in a chat's message and answer with its result.

    Cancels the job if the client disconnects before it ends. Raises InputError if the request cannot be a job, Busy or
    JournalError if it is not accepted, and JobFailed if it ends without an answer.
    """
    job = await _submit(body, backend)
    envelope = {"id": f"chatcmpl-{job}", "created": int(time.time()), "model": body.model, "job": job}
    if body.stream:
        events = _chat_events({**envelope, "object": "chat.completion.chunk"}, job, backend, body.include_usage)
        return await sse.response_once_started(events, lambda: True)
    reasoning = await _whole_reasoning(job, backend)
    result = await _result(job, backend)
    message = {"role": "assistant", "reasoning": reasoning, "content": result["answer"]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return JSONResponse({**envelope, "object": "chat.completion", "choices": [choice], "usage": _usage(result)})


async def respond(body: TeamResponse, backend: Backend) -> Response:
    """Run a job for the problem in a response's input and answer with its result. Cancels and raises as `chat` does."""
    job = await _submit(body, backend)
    answer = _ResponsesAnswer(body, job)
    if body.stream:
        return await sse.response_once_started(_response_events(answer, job, backend), lambda: True)
    reasoning = await _whole_reasoning(job, backend)
    return JSONResponse(answer.completed(reasoning, await _result(job, backend)))


async def _submit(body: TeamRequest, backend: Backend) -> str:
    """Submit the job for a request and return its id."""
    record, _ = await backend.jobs.submit(body.submission())
    return record.id


async def _chat_events(
    envelope: dict[str, Any], job: str, backend: Backend, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the events of a streamed chat: the reasoning as the job proceeds, then the result."""

    def chunk(finish_reason: str | None = None, **delta: str) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse.format_event({**envelope, "choices": [choice]})

    with _cancel_if_abandoned(job, backend):
        yield chunk(role="assistant", content="")
        async with aclosing(_reasoning(job, backend)) as lines:
            async for line in lines:
                yield chunk(reasoning=line)
    try:
        result = await _result(job, backend)
    except TroupeError as error:
        yield sse.format_event(error_body(error))
        return
    yield chunk(content=result["answer"])
    yield chunk(finish_reason="stop")
    if include_usage:
        yield sse.format_event({**envelope, "choices": [], "usage": _usage(result)})
    yield sse.DONE


async def _response_events(answer: "_ResponsesAnswer", job: str, backend: Backend) -> AsyncGenerator[str, None]:
    """Yield the events of a streamed response: the reasoning as the job proceeds, then the result."""
    part: dict[str, Any] = {"item_id": answer.reasoning_id, "output_index": 0, "content_index": 0}
    reasoning = ""
    with _cancel_if_abandoned(job, backend):
        yield answer.event("response.created", response=answer.response("in_progress", []))
        yield answer.event("response.in_progress", response=answer.response("in_progress", []))
        yield answer.event("response.output_item.added", output_index=0, item=answer.reasoning("", "in_progress"))
        async with aclosing(_reasoning(job, backend)) as lines:
            async for line in lines:
                reasoning += line
                yield answer.event("response.reasoning_text.delta", **part, delta=line)
    yield answer.event("response.reasoning_text.done", **part, text=reasoning)
    yield answer.event("response.output_item.done", output_index=0, item=answer.reasoning(reasoning))
    try:
        result = await _result(job, backend)
    except TroupeError as error:
        detail = error_body(error)["error"]
        failed = {**answer.response("failed", []), "error": {"code": "server_error", "message": detail["message"]}}
        yield answer.event("response.failed", response=failed)
        return
    text = result["answer"]
    part = {"item_id": answer.message_id, "output_index": 1, "content_index": 0}
    yield answer.event("response.output_item.added", output_index=1, item=answer.message(None, "in_progress"))
    yield answer.event("response.content_part.added", **part, part=_text_part(""))
    yield answer.event("response.output_text.delta", **part, delta=text, logprobs=[])
    yield answer.event("response.output_text.done", **part, text=text, logprobs=[])
    yield answer.event("response.content_part.done", **part, part=_text_part(text))
    yield answer.event("response.output_item.done", output_index=1, item=answer.message(text))
    yield answer.event("response.completed", response=answer.completed(reasoning, result))


class _ResponsesAnswer:
    """The objects of one answer in the format of the Responses API."""

    def __init__(self, body: TeamResponse, job: str) -> None:
        self._body = body
        self._job = job
        self._created = int(time.time())
        self._number = -1
        self.reasoning_id = f"rs_{uuid.uuid4().hex}"
        self.message_id = f"msg_{uuid.uuid4().hex}"

    def event(self, kind: str, **content: Any) -> str:
        """Return the next event."""
        self._number += 1
        data = {"type": kind, "sequence_number": self._number, **content}
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"

    def completed(self, reasoning: str, result: dict[str, Any]) -> dict[str, Any]:
        """Return the response of a job that has ended well."""
        usage = _usage(result)
        response = self.response("completed", [self.reasoning(reasoning), self.message(result["answer"])])
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return response

    def response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the response object without its usage."""
        return {
            "id": f"resp_{self._job}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._body.model,
            "job": self._job,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": self._body.metadata or {},
            "parallel_tool_calls": False,
            "temperature": self._body.temperature,
            "top_p": None,
            "tool_choice": "none",
            "tools": [],
            "usage": None,
        }

    def reasoning(self, text: str, status: str = "completed") -> dict[str, Any]:
        """Return the output item with the team's deliberation."""
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": self.reasoning_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def message(self, text: str | None, status: str = "completed") -> dict[str, Any]:
        """Return the output item with the result."""
        content = [] if text is None else [_text_part(text)]
        return {"id": self.message_id, "type": "message", "role": "assistant", "content": content, "status": status}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _reasoning(job: str, backend: Backend) -> AsyncGenerator[str, None]:
    """Yield the lines of the reasoning until the job ends."""
    async with aclosing(backend.jobs.events.follow_job(job)) as events:
        async for event in events:
            for line in _lines(event):
                yield line


async def _whole_reasoning(job: str, backend: Backend) -> str:
    """Return the reasoning once the job has ended. Cancel the job if the client disconnects before."""
    with _cancel_if_abandoned(job, backend):
        return "".join([line async for line in _reasoning(job, backend)])


@contextmanager
def _cancel_if_abandoned(job: str, backend: Backend) -> Iterator[None]:
    """Cancel a job if its client disconnects before it ends."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        backend.jobs.cancel_soon(job)
        raise


def _lines(event: JobEvent) -> list[str]:
    """Return the lines that an event adds to the reasoning."""
    return [
        f"{entry['role']}: {entry['input']} → {entry['output']}{_MARKS.get(entry['verdict'], '')}\n"
        for entry in event.data.get("entries", ())
    ]


async def _result(job: str, backend: Backend) -> dict[str, Any]:
    """Return the result of a job that has ended. Raises JobFailed if it has no answer."""
    record = await backend.jobs.get(job)
    if record is None or record.state is not JobState.DONE or record.result is None:
        state = record.state if record else "forgotten"
        error = (record.result or {}).get("error") if record else None
        raise JobFailed(f"job {job} has no answer, because it is {state}{f': {error}' if error else ''}")
    return record.result


def _usage(result: dict[str, Any]) -> dict[str, int]:
    """Return OpenAI's usage object for all calls of a job."""
    seats = result["usage"].values()
    prompt_tokens = sum(seat["prompt_tokens"] for seat in seats)
    completion_tokens = sum(seat["completion_tokens"] for seat in seats)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
