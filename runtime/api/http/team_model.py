"""The model `team`: a chat with it is a job. The team's deliberation is the reasoning, its result the content."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from fastapi.responses import JSONResponse, Response

from runtime.api.http import sse
from runtime.api.http.backend import Backend
from runtime.api.http.errors import JobFailed, error_body
from runtime.api.http.openai_answers import ChatFormat, usage
from runtime.api.http.openai_schemas import ChatRequest
from runtime.errors import InputError, TroupeError
from runtime.jobs.job import JobState
from runtime.jobs.journal.records import JobEvent
from runtime.jobs.submission import Submission

TEAM = "team"
SUPPORTED_KEYS = {"model", "messages", "temperature", "seed", "stream", "stream_options", "user", "metadata", "store"}
"""The keys that the model `team` supports. The team's seats set all other sampling themselves."""
_MARKS = {"accepted": " ✓", "rejected": " ✗"}


async def chat(body: ChatRequest, backend: Backend) -> Response:
    """Run a job for the problem in a chat's message and answer with its result.

    Cancels the job if the client disconnects before it ends. Raises InputError if the request cannot be a job, Busy or
    JournalError if it is not accepted, and JobFailed if it ends without an answer.
    """
    job = await _submit(body, backend)
    answer = ChatFormat(body.model)
    if body.stream:
        return await sse.openai_response(_stream(answer, job, backend, body.include_usage))
    reasoning: list[str] = []
    with _cancel_if_abandoned(job, backend):
        async with aclosing(backend.jobs.events.follow_job(job)) as events:
            async for event in events:
                reasoning += _reasoning_lines(event)
    result = await _result(job, backend)
    message = {"role": "assistant", "reasoning": "".join(reasoning), "content": result["answer"]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return JSONResponse({**answer.envelope(), "job": job, "choices": [choice], "usage": _usage(result)})


async def _submit(body: ChatRequest, backend: Backend) -> str:
    """Submit the job for a chat and return its id."""
    if unsupported := body.changed_keys() - SUPPORTED_KEYS:
        seat = next(iter(backend.team.seats))
        raise InputError(f"{min(unsupported)}: the model `{TEAM}` does not support it; its seats, such as {seat!r}, do")
    if [message.role for message in body.messages] != ["user"]:
        raise InputError(f"messages: the model `{TEAM}` takes exactly one message: the problem, with the role `user`")
    problem = body.messages[0].to_message().content
    submission = Submission.read({"problem": problem, "temperature": body.temperature, "seed": body.seed})
    record, _ = await backend.jobs.submit(submission)
    return record.id


async def _stream(
    answer: ChatFormat, job: str, backend: Backend, include_usage: bool
) -> AsyncGenerator[dict[str, Any] | str, None]:
    """Yield the events of a streamed answer: the reasoning as the job proceeds, then the result."""
    envelope = {**answer.envelope(streaming=True), "job": job}

    def chunk(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**envelope, "choices": [choice]}

    with _cancel_if_abandoned(job, backend):
        yield chunk(role="assistant", content="")
        async with aclosing(backend.jobs.events.follow_job(job)) as events:
            async for event in events:
                for line in _reasoning_lines(event):
                    yield chunk(reasoning=line)
    try:
        result = await _result(job, backend)
    except TroupeError as error:
        yield error_body(error)
        return
    yield chunk(content=result["answer"])
    yield chunk(finish_reason="stop")
    if include_usage:
        yield {**envelope, "choices": [], "usage": _usage(result)}
    yield sse.DONE


@contextmanager
def _cancel_if_abandoned(job: str, backend: Backend) -> Iterator[None]:
    """Cancel a job if its client disconnects before it ends."""
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        backend.jobs.cancel_soon(job)
        raise


def _reasoning_lines(event: JobEvent) -> list[str]:
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
    seats = result["usage"].values()
    return usage(sum(seat["prompt_tokens"] for seat in seats), sum(seat["completion_tokens"] for seat in seats))
