"""OpenAI's own client against the service, over modelled engines. What vLLM adds is in tests/e2e/test_serve.py."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from runtime.errors import RequestRefused
from tests.runtime.api.http.conftest import PROBLEM, Served, Start


def client(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_the_models_are_the_team_and_its_seats(served: Served) -> None:
    async with client(served) as api:
        assert [model.id async for model in api.models.list()] == ["team", "planner", "solver", "critic"]
        assert (await api.models.retrieve("solver")).id == "solver"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; there are team, planner"):
            await api.models.retrieve("gpt")


async def test_the_team_answers_after_its_reasoning(served: Served) -> None:
    async with client(served) as api:
        answer = await api.chat.completions.create(model="team", messages=said(PROBLEM))
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("17", "stop")
    reasoning = str(message.reasoning)  # type: ignore[attr-defined]
    assert reasoning.splitlines()[0] == f"planner: {PROBLEM} → A=12+7; B=A*3; C=45-5; D=B-C"
    assert len(reasoning.splitlines()) == 9
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


async def test_the_team_streams_its_reasoning_as_it_goes(served: Served) -> None:
    async with client(served) as api:
        stream = await api.chat.completions.create(
            model="team", messages=said(PROBLEM), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    reasoning = [delta.reasoning for delta in deltas if getattr(delta, "reasoning", None)]  # type: ignore[attr-defined]
    assert len(reasoning) == 9
    assert "".join(delta.content or "" for delta in deltas) == "17"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_a_seat_is_its_engine(served: Served) -> None:
    async with client(served) as api:
        answer = await api.chat.completions.create(model="solver", messages=said("some words of mine"), temperature=0)
        stream = await api.chat.completions.create(
            model="solver", messages=said("some words of mine"), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].message.content == "some words of mine"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "some words of mine"
    assert chunks[-1].usage == answer.usage
    assert served.backend.engines["solver"].stats().requests == 2


async def test_several_choices_and_prompts(start: Start) -> None:
    served = await start(time_scale=1)
    async with client(served) as api:
        chat = await api.chat.completions.create(model="critic", messages=said("a b"), n=3)
        assert [(c.index, c.message.content) for c in chat.choices] == [(0, "a b"), (1, "a b"), (2, "a b")]
        text = await api.completions.create(model="critic", prompt=["a b", "c d e"], max_tokens=2)
        assert [(c.index, c.text, c.finish_reason) for c in text.choices] == [(0, "a b", "stop"), (1, "c d", "length")]
        tokens = await api.completions.create(model="critic", prompt=[1, 2, 3])
        assert tokens.usage is not None
        assert tokens.usage.prompt_tokens == 3
        stream = await api.completions.create(model="critic", prompt=["a b", "c d e"], stream=True)
        pieces: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                pieces[choice.index] = pieces.get(choice.index, "") + choice.text
        assert pieces == {0: "a b", 1: "c d e"}


async def test_the_greatest_seeds_of_all_choices_are_taken(served: Served) -> None:
    body = {"model": "solver", "messages": said("a b"), "seed": 2**63 - 3, "n": 3}
    assert (await served.client.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": said("x") * 2}, "messages", "one message"),
        ({"model": "nobody"}, None, "there is no model"),
        ({"model": "solver", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"model": "solver", "tools": [{"type": "function"}]}, "tools", "at most 0"),
        ({"model": "solver", "colour": "red"}, "colour", "not permitted"),
        ({"model": "solver", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"model": "solver", "seed": 2**63 - 1, "n": 2}, "seed", f"at most {2**63 - 2}"),
        ({"model": "solver", "seed": 2**63}, "seed", "less than"),
        ({"n": 2}, "n", "the team does not take it"),
        ({"messages": said("1000+1")}, None, "999"),
        ({"model": "solver", "response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
    ],
)
async def test_what_is_not_understood_is_refused_by_name(
    served: Served, change: dict[str, Any], field: str | None, says: str
) -> None:
    answer = await served.client.post("/v1/chat/completions", json={"model": "team", "messages": said("1+1"), **change})
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert says in error["message"]
    assert (error["param"] or "").partition(".")[0] == (field or "")


async def left(served: Served, engine: str, requests: int = 1, **body: Any) -> None:
    """Ask, and go away once an engine has so many requests more, before the answer has come."""
    stats = served.backend.engines[engine].stats
    before = stats().requests
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as leaving:
        asking = asyncio.create_task(leaving.post("/v1/chat/completions", json=body))
        async with asyncio.timeout(60):
            while stats().requests < before + requests:  # noqa: ASYNC110  the engine has no event for it
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_whoever_goes_away_cancels_its_job(start: Start) -> None:
    served = await start(time_scale=50)
    for stream in (True, False):
        await left(served, "planner", model="team", messages=said(PROBLEM), stream=stream)
    async with asyncio.timeout(60):
        while True:
            jobs = (await served.client.get("/jobs")).json()["jobs"]
            if [job["state"] for job in jobs] == ["cancelled"] * 2:
                break


async def idle(served: Served) -> None:
    """Wait until no request is in the solver's engine."""
    async with asyncio.timeout(60):
        while served.backend.engines["solver"].usage.in_flight:  # noqa: ASYNC110  the engine has no event for it
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("n", [1, 3])
async def test_whoever_goes_away_frees_the_engine(start: Start, n: int) -> None:
    served = await start(time_scale=50)
    for stream in (True, False):
        await left(served, "solver", n, model="solver", messages=said("word " * 50), stream=stream, n=n)
    assert served.backend.engines["solver"].stats().requests == 2 * n
    await idle(served)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refused_prompt_refuses_the_request_and_ends_its_siblings(
    start: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    served = await start(time_scale=1000)  # the siblings would write for minutes
    engine = served.backend.engines["solver"]
    assert isinstance(engine, FakeEngine)
    script = engine._script

    def refusing(request: GenerateRequest) -> str:
        if request.prompt == "too long":
            raise RequestRefused("engine solver refused the request: it is too long")
        return script(request)

    monkeypatch.setattr(engine, "_script", refusing)
    body = {"model": "solver", "prompt": ["word " * 50, "too long", "word " * 50], "stream": stream}
    answer = await served.client.post("/v1/completions", json=body)
    assert (answer.status_code, "it is too long" in answer.text) == (400, True)
    assert engine.stats().requests == 2
    await idle(served)


async def test_an_engine_that_dies_ends_a_stream_of_several_with_an_error(start: Start) -> None:
    served = await start(time_scale=1)
    body = {"model": "solver", "prompt": ["word " * 1000] * 2, "max_tokens": 1000, "stream": True}
    async with served.client.stream("POST", "/v1/completions", json=body) as answer:
        events: list[dict[str, Any]] = []
        async for line in answer.aiter_lines():
            if not events:
                served.backend.engines["solver"].kill()
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
    assert events[0]["choices"][0]["text"] == "word"
    assert events[-1]["error"]["code"] == 503
    await idle(served)


async def test_a_hundred_stream_at_once(start: Start) -> None:
    served = await start(time_scale=0.2)

    async def one(number: int) -> str:
        body = {"model": "solver", "messages": said(f"{number} " + "word " * 20), "stream": True}
        text = ""
        async with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"]["content"]
        return text

    texts = await asyncio.gather(*(one(number) for number in range(100)))
    assert [text.split()[0] for text in texts] == [str(number) for number in range(100)]
    assert all(text.count("word") == 20 for text in texts)
