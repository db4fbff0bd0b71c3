"""The models that are seats of the team, over modelled engines."""

import asyncio
import json
from typing import Any

import pytest

from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from runtime.errors import RequestRefused
from tests.runtime.api.http.conftest import Served, Start, user_message
from tests.runtime.api.http.disconnects import chat_and_disconnect


async def test_seat_answers_whole_and_streamed(served: Served) -> None:
    text = "some words of mine"
    async with served.openai_client() as api:
        answer = await api.chat.completions.create(model="solver", messages=user_message(text), temperature=0)
        stream = await api.chat.completions.create(
            model="solver", messages=user_message(text), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == answer.usage
    assert served.backend.engines["solver"].stats().requests == 2


async def test_several_choices_and_prompts_in_one_request(start: Start) -> None:
    served = await start(time_scale=1)
    async with served.openai_client() as api:
        chat = await api.chat.completions.create(model="critic", messages=user_message("a b"), n=3)
        assert [(c.index, c.message.content) for c in chat.choices] == [(0, "a b"), (1, "a b"), (2, "a b")]
        text = await api.completions.create(model="critic", prompt=["a b", "c d e"], max_tokens=2)
        assert [(c.index, c.text, c.finish_reason) for c in text.choices] == [(0, "a b", "stop"), (1, "c d", "length")]
        tokens = await api.completions.create(model="critic", prompt=[1, 2, 3])
        assert tokens.usage is not None
        assert tokens.usage.prompt_tokens == 3
        stream = await api.completions.create(model="critic", prompt=["a b", "c d e"], stream=True)
        streamed: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] = streamed.get(choice.index, "") + choice.text
        assert streamed == {0: "a b", 1: "c d e"}


async def test_largest_seed_for_three_choices_is_accepted(served: Served) -> None:
    body = {"model": "solver", "messages": user_message("a b"), "seed": 2**63 - 3, "n": 3}
    assert (await served.client.post("/v1/chat/completions", json=body)).status_code == 200


async def wait_until_idle(served: Served) -> None:
    """Return once the solver's engine has no requests."""
    async with asyncio.timeout(60):
        while served.backend.engines["solver"].usage.in_flight:  # noqa: ASYNC110  the engine has no event for this
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("n", [1, 3])
async def test_disconnect_aborts_the_requests(start: Start, n: int) -> None:
    served = await start(time_scale=50)
    for stream in (True, False):
        await chat_and_disconnect(
            served, "solver", n, model="solver", messages=user_message("word " * 50), stream=stream, n=n
        )
    assert served.backend.engines["solver"].stats().requests == 2 * n
    await wait_until_idle(served)


@pytest.mark.parametrize("stream", [True, False])
async def test_refused_prompt_fails_the_request_and_aborts_the_other_prompts(
    start: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    served = await start(time_scale=1000)  # the other prompts would take minutes
    engine = served.backend.engines["solver"]
    assert isinstance(engine, FakeEngine)
    script = engine._script

    def refusing(request: GenerateRequest) -> str:
        if request.prompt == "too long":
            raise RequestRefused("engine solver refused the request: it is too long")
        return script(request)

    monkeypatch.setattr(engine, "_script", refusing)
    body = {"model": "solver", "prompt": ["word " * 50, "too long", "word " * 50], "stream": stream}
    response = await served.client.post("/v1/completions", json=body)
    assert (response.status_code, "it is too long" in response.text) == (400, True)
    assert engine.stats().requests == 2
    await wait_until_idle(served)


async def test_engine_death_ends_a_stream_with_an_error_event(start: Start) -> None:
    served = await start(time_scale=1)
    body = {"model": "solver", "prompt": ["word " * 1000] * 2, "max_tokens": 1000, "stream": True}
    async with served.client.stream("POST", "/v1/completions", json=body) as response:
        events: list[dict[str, Any]] = []
        async for line in response.aiter_lines():
            if not events:
                served.backend.engines["solver"].kill()
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
    assert events[0]["choices"][0]["text"] == "word"
    assert events[-1]["error"]["code"] == 503
    await wait_until_idle(served)


async def test_a_hundred_concurrent_streams(start: Start) -> None:
    served = await start(time_scale=0.2)

    async def streamed_text(number: int) -> str:
        body = {"model": "solver", "messages": user_message(f"{number} " + "word " * 20), "stream": True}
        text = ""
        async with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"]["content"]
        return text

    texts = await asyncio.gather(*(streamed_text(number) for number in range(100)))
    assert [text.split()[0] for text in texts] == [str(number) for number in range(100)]
    assert all(text.count("word") == 20 for text in texts)
