"""The models that are seats of the team: vLLM's handlers over modelled engines."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from runtime.errors import ConfigError, RequestRefused
from tests.runtime.api.http.conftest import Served, Start, configured, service, user_message
from tests.runtime.api.http.disconnects import chat_and_disconnect


async def test_seat_answers_whole_and_streamed(served: Served) -> None:
    text = "1 + 2 * 3"
    async with served.openai_client() as api:
        answer = await api.chat.completions.create(model="solver", messages=user_message(text), temperature=0)
        stream = await api.chat.completions.create(
            model="solver", messages=user_message(text), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == answer.usage
    assert served.backend.engines["solver"].stats().requests == 2


async def test_several_choices_and_prompts_in_one_request(start: Start) -> None:
    served = await start(time_scale=1)
    async with served.openai_client() as api:
        chat = await api.chat.completions.create(model="critic", messages=user_message("1 2"), n=3)
        assert [(c.index, c.message.content) for c in chat.choices] == [(0, "1 2"), (1, "1 2"), (2, "1 2")]
        text = await api.completions.create(model="critic", prompt=["1 2", "3 4 5"], max_tokens=2)
        assert [(c.index, c.text, c.finish_reason) for c in text.choices] == [(0, "1 2", "stop"), (1, "3 4", "length")]
        tokens = await api.completions.create(model="critic", prompt=[1, 2, 3])
        assert tokens.usage is not None
        assert tokens.usage.prompt_tokens == 3
        stream = await api.completions.create(model="critic", prompt=["1 2", "3 4 5"], stream=True)
        streamed: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] = streamed.get(choice.index, "") + choice.text
        assert streamed == {0: "1 2", 1: "3 4 5"}


async def test_largest_seed_for_three_choices_is_accepted(served: Served) -> None:
    body = {"model": "solver", "messages": user_message("1 2"), "seed": 2**63 - 3, "n": 3}
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
            served, "solver", n, model="solver", messages=user_message("1 " * 40), stream=stream, n=n
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
        if request.rendered is not None and request.rendered["prompt"] == "1 + 1":
            raise RequestRefused("engine solver refused the request: it is too long")
        return script(request)

    monkeypatch.setattr(engine, "_script", refusing)
    body = {"model": "solver", "prompt": ["1 " * 40, "1 + 1", "1 " * 40], "stream": stream}
    response = await served.client.post("/v1/completions", json=body)
    assert (response.status_code, "it is too long" in response.text) == (400, True)
    assert engine.stats().requests == 2
    await wait_until_idle(served)


async def test_engine_death_ends_a_stream_with_an_error_event(start: Start) -> None:
    served = await start(time_scale=20)
    body = {"model": "solver", "prompt": ["1 " * 40] * 2, "max_tokens": 40, "stream": True}
    async with served.client.stream("POST", "/v1/completions", json=body) as response:
        events: list[dict[str, Any]] = []
        async for line in response.aiter_lines():
            if not events:
                served.backend.engines["solver"].kill()
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
    assert events[0]["choices"][0]["text"] == "1"
    assert events[-1]["error"]["code"] == 503
    await wait_until_idle(served)


async def test_a_hundred_concurrent_streams(start: Start) -> None:
    served = await start(time_scale=0.2)

    async def streamed_text(number: int) -> str:
        body = {"model": "solver", "messages": user_message(f"{number} " + "+ " * 20), "stream": True}
        text = ""
        async with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    texts = await asyncio.gather(*(streamed_text(number) for number in range(100)))
    assert [text.split()[0] for text in texts] == [str(number) for number in range(100)]
    assert all(text.count("+") == 20 for text in texts)


CALL = {"name": "add", "arguments": {"a": 12, "b": 7}}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.fixture
async def calling(tmp_path: Path) -> AsyncIterator[Served]:
    """A service whose solver calls the tool `add` twice, and whose planner thinks aloud.

    The solver answers once it has read the results.
    """
    chosen = configured(tmp_path)
    solver = chosen.engines["solver"].model_copy(update={"tool_call_parser": "hermes"})
    planner = chosen.engines["planner"].model_copy(update={"reasoning_parser": "granite"})
    chosen = chosen.model_copy(update={"engines": {**chosen.engines, "solver": solver, "planner": planner}})

    def script(request: GenerateRequest) -> str:
        assert request.rendered is not None
        if "19" in request.rendered["prompt"]:
            return "The sum is 19"
        call = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
        return f"I add. {call}\n{call}"

    async with service(chosen) as served:
        scripts = {"solver": script, "planner": lambda _: "Here is my thought process: 12+7 Here is my response: 19"}
        for name, replying in scripts.items():
            engine = served.backend.engines[name]
            assert isinstance(engine, FakeEngine)
            engine._script = replying
        yield served


async def test_a_chat_calls_tools_and_reads_their_results(calling: Served) -> None:
    messages = user_message("12+7")
    async with calling.openai_client() as api:
        answer = await api.chat.completions.create(model="solver", messages=messages, tools=[ADD])
        called = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert (called.content or "").strip() == "I add."
        assert called.tool_calls is not None
        assert [json.loads(call.function.arguments) for call in called.tool_calls] == [CALL["arguments"]] * 2  # type: ignore[union-attr]
        messages.append(called.model_dump(include={"role", "content", "tool_calls"}))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "19"} for call in called.tool_calls]
        final = await api.chat.completions.create(model="solver", messages=messages, tools=[ADD])
        one = await api.chat.completions.create(
            model="solver", messages=user_message("12+7"), tools=[ADD], parallel_tool_calls=False
        )
    assert (final.choices[0].message.content or "").strip() == "The sum is 19"
    assert len(one.choices[0].message.tool_calls or ()) == 1


async def test_a_streamed_chat_calls_tools(calling: Served) -> None:
    arguments: dict[int, str] = {}
    async with calling.openai_client() as api:
        stream = await api.chat.completions.create(
            model="solver", messages=user_message("12+7"), tools=[ADD], stream=True
        )
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
            reason = chunk.choices[0].finish_reason
    assert [json.loads(text) for text in arguments.values()] == [CALL["arguments"]] * 2
    assert reason == "tool_calls"


async def test_a_response_calls_tools(calling: Served) -> None:
    tool: Any = {"type": "function", **ADD["function"]}
    async with calling.openai_client() as api:
        answer = await api.responses.create(model="solver", input="12+7", tools=[tool])
        stream = await api.responses.create(model="solver", input="12+7", tools=[tool], stream=True)
        events = [event async for event in stream]
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [CALL["arguments"]] * 2
    completed = events[-1]
    assert completed.type == "response.completed"
    assert [item.type for item in completed.response.output] == ["message", "function_call", "function_call"]
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_reasoning_is_told_apart_from_the_answer(calling: Served) -> None:
    async with calling.openai_client() as api:
        whole = await api.chat.completions.create(model="planner", messages=user_message("12+7"))
        stream = await api.chat.completions.create(model="planner", messages=user_message("12+7"), stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    message = whole.choices[0].message
    assert (message.content or "").strip() == "19"
    assert str(message.reasoning).strip() == "12+7"  # type: ignore[attr-defined]
    assert "".join(delta.content or "" for delta in deltas).strip() == "19"
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas).strip() == "12+7"


async def test_a_message_of_anthropics_api_calls_tools(calling: Served) -> None:
    tool = {"name": "add", "description": "Add.", "input_schema": ADD["function"]["parameters"]}
    body = {"model": "solver", "max_tokens": 50, "messages": user_message("12+7"), "tools": [tool]}
    answer = (await calling.client.post("/v1/messages", json=body)).json()
    assert answer["stop_reason"] == "tool_use"
    assert [part["input"] for part in answer["content"] if part["type"] == "tool_use"] == [CALL["arguments"]] * 2


async def test_tokens_and_text_of_a_seats_model(served: Served) -> None:
    tokens = (await served.client.post("/tokenize", json={"model": "solver", "prompt": "12+7"})).json()["tokens"]
    text = await served.client.post("/detokenize", json={"model": "solver", "tokens": tokens})
    assert text.json()["prompt"].replace(" ", "") == "12+7"
    count = {"model": "solver", "messages": user_message("12+7")}
    assert (await served.client.post("/v1/messages/count_tokens", json=count)).json()["input_tokens"] == 5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "1 " * 40}),
        ("/v1/messages", {"max_tokens": 40, "messages": user_message("1 " * 40)}),
    ],
)
async def test_engine_death_ends_streams_of_other_apis_with_an_error_event(
    start: Start, path: str, body: dict[str, Any]
) -> None:
    served = await start(time_scale=20)
    async with served.client.stream("POST", path, json={"model": "solver", "stream": True, **body}) as response:
        lines = []
        async for line in response.aiter_lines():
            served.backend.engines["solver"].kill()
            lines += [line] if line else []
    assert lines[-2] == "event: error"
    assert "engine solver is dead" in lines[-1]


async def test_an_unknown_parser_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    solver = chosen.engines["solver"].model_copy(update={"tool_call_parser": "no-such-parser"})
    async with service(chosen.model_copy(update={"engines": {**chosen.engines, "solver": solver}})) as served:
        with pytest.raises(ConfigError, match=r"^engines.solver: tool_call_parser .* cannot be used: .*no-such-parser"):
            await served.backend.seat_model("solver")
