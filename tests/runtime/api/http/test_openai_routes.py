"""OpenAI's API with OpenAI's own client, over modelled engines. Real engines are in tests/e2e/test_serve.py."""

from typing import Any

import openai
import pytest

from tests.runtime.api.http.conftest import Served, user_message

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost:1/x.png"}}


async def test_models_are_the_team_and_its_seats(served: Served) -> None:
    async with served.openai_client() as api:
        assert [model.id async for model in api.models.list()] == ["team", "planner", "solver", "critic"]
        assert (await api.models.retrieve("solver")).id == "solver"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; the models are team, planner"):
            await api.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": user_message("x") * 2}, "messages", "one message"),
        ({"tools": [{"type": "function"}]}, "tools", "the model `team` does not support it"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "should be 'user'"),
        ({"model": "nobody"}, None, "there is no model"),
        ({"model": 7}, "model", "the models are team, planner"),
        ({"model": "solver", "temperature": 3}, "temperature", "in [0, 2]"),
        ({"model": "solver", "tools": [ADD]}, "tools", "set engines.solver.tool_call_parser"),
        ({"model": "solver", "colour": "red"}, "colour", "not supported"),
        ({"model": "solver", "tempratur": 1}, "tempratur", "did you mean temperature?"),
        ({"model": "solver", "use_beam_search": True}, "use_beam_search", "not supported"),
        ({"model": "solver", "n": 17}, "n", "at most 16"),
        ({"model": "solver", "n": "5000"}, "n", "at most 16"),
        ({"model": "solver", "top_k": 10**20}, "top_k", "at most 2147483647"),
        ({"model": "solver", "prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"model": "solver", "background": True}, "background", "not supported"),
        ({"model": "solver", "functions": [{}]}, "functions", "not supported"),
        ({"model": "solver", "structured_outputs": "x"}, None, "malformed"),
        ({"model": "solver", "messages": [{"role": "user", "content": [IMAGE]}]}, None, "not a multimodal model"),
        ({"model": "solver", "seed": 2**63 - 1, "n": 2}, "seed", f"at most {2**63 - 2}"),
        ({"model": "solver", "seed": 2**63}, "seed", "less than"),
        ({"n": 2}, "n", "should be 1"),
        ({"messages": user_message("1000+1")}, None, "999"),
        ({"model": "solver", "response_format": {"type": "json_schema"}}, "response_format", "must be provided"),
    ],
)
async def test_invalid_chat_names_the_field(
    served: Served, change: dict[str, Any], field: str | None, message: str
) -> None:
    body = {"model": "team", "messages": user_message("1+1"), **change}
    response = await served.client.post("/v1/chat/completions", json=body)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["param"] or "").partition(".")[0] == (field or "")


@pytest.mark.parametrize("model", ["team", "solver"])
@pytest.mark.parametrize(
    ("member", "field", "message"),
    [
        (r'"metadata": {"a": "\ud800"}', "metadata", "metadata: it has half of a surrogate pair"),
        ('"metadata": {"a": [NaN]}', "metadata", "metadata: it has a number that is not finite"),
        (r'"\ud800": 1', None, r"'\ud800': it has half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize(
    ("path", "problem"),
    [("/v1/responses", '"input": "1+1"'), ("/v1/messages", '"max_tokens": 4, "messages": []')],
)
async def test_body_that_could_not_be_written_again_names_the_field(
    served: Served, path: str, problem: str, model: str, member: str, field: str | None, message: str
) -> None:
    body = f'{{"model": "{model}", {problem}, {member}}}'
    response = await served.client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == field


@pytest.mark.parametrize("prompt", [None, [], ["1"] * 65])
async def test_missing_prompts_are_refused(served: Served, prompt: object) -> None:
    response = await served.client.post("/v1/completions", json={"model": "solver", "prompt": prompt})
    assert response.status_code == 400
    assert "prompt" in response.json()["error"]["message"]


async def test_responses_are_neither_stored_nor_made_in_the_background(served: Served) -> None:
    body = {"model": "solver", "input": "12+7"}
    for change, status in (
        ({"background": True, "store": True}, 400),
        ({"background": True, "store": "false"}, 400),
        ({"previous_response_id": "resp_1"}, 404),
        ({"store": True}, 200),
    ):
        response = await served.client.post("/v1/responses", json={**body, **change})
        assert response.status_code == status, change


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/tokenize"])
async def test_the_team_answers_chats_and_responses_only(served: Served, path: str) -> None:
    response = await served.client.post(path, json={"model": "team", "prompt": "1+1"})
    assert response.status_code == 400
    assert "send the request to one of its seats, such as 'planner'" in response.json()["error"]["message"]
