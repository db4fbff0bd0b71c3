"""OpenAI's API with OpenAI's own client, over modelled engines. Real engines are in tests/e2e/test_serve.py."""

from typing import Any

import openai
import pytest

from tests.runtime.api.http.conftest import Served, user_message


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
        ({"model": "nobody"}, None, "there is no model"),
        ({"model": "solver", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"model": "solver", "tools": [{"type": "function"}]}, "tools", "at most 0"),
        ({"model": "solver", "colour": "red"}, "colour", "not permitted"),
        ({"model": "solver", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"model": "solver", "seed": 2**63 - 1, "n": 2}, "seed", f"at most {2**63 - 2}"),
        ({"model": "solver", "seed": 2**63}, "seed", "less than"),
        ({"n": 2}, "n", "the model `team` does not support it"),
        ({"messages": user_message("1000+1")}, None, "999"),
        ({"model": "solver", "response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
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


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []]])
async def test_empty_list_of_prompts_names_the_field(served: Served, prompt: object) -> None:
    response = await served.client.post("/v1/completions", json={"model": "solver", "prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")
