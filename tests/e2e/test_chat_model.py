"""A real chat model through `troupe serve --config cpu-chat`: its chat template, streams, schemas and tool calls."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import LONG_S, REPOSITORY, Command, wait_until
from tests.e2e.test_serve import Service, openai_client, user_message

pytestmark = pytest.mark.e2e

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "strict": True,  # otherwise vLLM holds the model to a call, but not to the schema of its arguments
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SHORT: Any = {"temperature": 0, "max_tokens": 48}


@pytest.fixture(scope="module")
def chat_model() -> None:
    subprocess.run([sys.executable, str(REPOSITORY / "scripts" / "chat_model.py")], check=True)


REPLY_TOKENS = 200
BRIEF = f"""
extends: cpu-chat
team:
  planner: {{max_tokens: {REPLY_TOKENS}}}
  solver: {{max_tokens: {REPLY_TOKENS}}}
  critic: {{max_tokens: {REPLY_TOKENS}}}
  judge: {{max_tokens: {REPLY_TOKENS}}}
"""
"""The shipped team, with replies that take seconds rather than a minute."""


@pytest.fixture(scope="module")
def service(shared_troupe: Command, chat_model: None) -> Iterator[Service]:
    config = shared_troupe.folder / "brief.yaml"
    config.write_text(BRIEF)
    service = Service(shared_troupe, "--config", str(config))
    yield service
    service.kill()
    shared_troupe.nothing_left()


@pytest.fixture(scope="module")
def api(service: Service) -> openai.OpenAI:
    return openai_client(service)


def test_the_model_answers_by_its_chat_template(api: openai.OpenAI) -> None:
    messages = user_message("What is the capital of France?")
    whole = api.chat.completions.create(model="solver", messages=messages, **SHORT)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.choices[0].finish_reason == "stop"
    stream = api.chat.completions.create(model="solver", messages=messages, stream=True, **SHORT)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content


def test_a_prefix_that_the_engine_has_computed_counts_as_cached(api: openai.OpenAI) -> None:
    messages = user_message("Repeat after me: " + "one two three four five six seven eight " * 20)
    usages = [
        api.chat.completions.create(model="solver", messages=messages, temperature=0, max_tokens=1).usage
        for _ in range(2)
    ]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert (cached[1] or 0) > 100


def test_a_schema_holds_the_model_to_json(api: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = api.chat.completions.create(
        model="solver",
        messages=user_message("Name a colour."),
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
        **SHORT,
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_the_model_calls_a_tool_that_it_must_call(api: openai.OpenAI, choice: Any) -> None:
    answer = api.chat.completions.create(
        model="solver", messages=user_message("Add 12 and 7."), tools=[ADD], tool_choice=choice, **SHORT
    )
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}


def test_the_model_may_answer_without_the_tool_and_reads_results(api: openai.OpenAI) -> None:
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 12, "b": 7}'}}
    messages: Any = [
        *user_message("Add 12 and 7."),
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "19"},
    ]
    answer = api.chat.completions.create(model="solver", messages=messages, tools=[ADD], **SHORT)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 150  # the tool, its call and its result are in the prompt


PIPELINE = """
extends: cpu-chat
workflow: {name: pipeline, seats: [coder, summarizer]}
"""


def test_a_team_of_a_weak_model_ends(service: Service) -> None:
    problem = "A train leaves at 9:40 and arrives at 11:05. How long does it travel?"
    id = httpx.post(f"{service.url}/jobs", json={"problem": problem}, timeout=LONG_S).json()["id"]
    wait_until(lambda: service.jobs()[id]["state"] in ("done", "failed"))
    result = service.jobs()[id]["result"]
    tokens = sum(used["completion_tokens"] for used in result["usage"].values())
    assert tokens <= REPLY_TOKENS * len(result["steps"])


def test_a_coder_has_its_program_run(shared_troupe: Command, chat_model: None, tmp_path: Path) -> None:
    config = tmp_path / "coder.yaml"
    config.write_text(PIPELINE)
    done = shared_troupe.run("solve", "--json", "--config", config, "What is 2 to the power of 20?")
    result = json.loads(done.stdout)
    assert [step["role"] for step in result["steps"]][-2:] == ["coder", "summarizer"]
    calls = [step for step in result["steps"] if step["input"].startswith("python ")]
    assert len(calls) in (1, 2)
    assert all(step["role"] == "coder" and step["output"] for step in calls)
    assert result["answer"]
