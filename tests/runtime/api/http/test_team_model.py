"""The model `team`."""

import asyncio

from tests.runtime.api.http.conftest import PROBLEM, Served, Start, user_message
from tests.runtime.api.http.disconnects import chat_and_disconnect


async def test_answer_comes_with_reasoning(served: Served) -> None:
    async with served.openai_client() as api:
        answer = await api.chat.completions.create(model="team", messages=user_message(PROBLEM))
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("17", "stop")
    reasoning = str(message.reasoning)  # type: ignore[attr-defined]
    assert reasoning.splitlines()[0] == f"planner: {PROBLEM} → A=12+7; B=A*3; C=45-5; D=B-C"
    assert len(reasoning.splitlines()) == 9
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


async def test_stream_sends_the_reasoning_line_by_line(served: Served) -> None:
    async with served.openai_client() as api:
        stream = await api.chat.completions.create(
            model="team", messages=user_message(PROBLEM), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    reasoning = [delta.reasoning for delta in deltas if getattr(delta, "reasoning", None)]  # type: ignore[attr-defined]
    assert len(reasoning) == 9
    assert "".join(delta.content or "" for delta in deltas) == "17"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_a_response_has_the_reasoning_and_the_answer(served: Served) -> None:
    async with served.openai_client() as api:
        whole = await api.responses.create(model="team", input=PROBLEM)
        stream = await api.responses.create(model="team", input=user_message(PROBLEM), stream=True)
        events = [event async for event in stream]
    assert (whole.status, whole.output_text) == ("completed", "17")
    assert whole.output[0].type == "reasoning"
    assert len((whole.output[0].content or [])[0].text.splitlines()) == 9
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens > 0
    assert len([event for event in events if event.type == "response.reasoning_text.delta"]) == 9
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "17"
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_a_streamed_response_of_a_cancelled_job_fails(start: Start) -> None:
    served = await start(time_scale=50)
    async with served.openai_client() as api:
        stream = await api.responses.create(model="team", input=PROBLEM, stream=True)
        async for event in stream:
            if event.type == "response.created":
                job = event.response.job  # type: ignore[attr-defined]
                await served.client.post(f"/jobs/{job}/cancel")
    assert event.type == "response.failed"
    assert event.response.error is not None
    assert "has no answer, because it is cancelled" in event.response.error.message


async def test_disconnect_cancels_the_job(start: Start) -> None:
    served = await start(time_scale=50)
    for stream in (True, False):
        await chat_and_disconnect(served, "planner", model="team", messages=user_message(PROBLEM), stream=stream)
    async with asyncio.timeout(60):
        while True:
            jobs = (await served.client.get("/jobs")).json()["jobs"]
            if [job["state"] for job in jobs] == ["cancelled"] * 2:
                break
