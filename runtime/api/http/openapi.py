"""The OpenAPI document: FastAPI's own, and the bodies of the routes whose requests vLLM's classes describe."""

import asyncio
import copy
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema

from runtime.api.http.team_requests import TEAM, TeamChat, TeamResponse
from runtime.engines.vllm_import import import_with_vllm

_SCHEMAS = "#/components/schemas"


def add_route(app: FastAPI, seats: list[str]) -> None:
    """Serve the document at /openapi.json. Its first request imports vLLM."""

    document: dict[str, Any] = {}
    making = asyncio.Lock()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        async with making:
            if not document:
                document.update(await asyncio.to_thread(_document, app, seats))
        return JSONResponse(document)


def _document(app: FastAPI, seats: list[str]) -> dict[str, Any]:
    document = copy.deepcopy(app.openapi())
    _describe_bodies(document, seats)
    return document


def _describe_bodies(document: dict[str, Any], seats: list[str]) -> None:
    vllm_serving = import_with_vllm("runtime.api.http.vllm_serving")
    bodies = {path: api.classes for path, api in vllm_serving.ROUTES.items()}
    for path, team_class in (("/v1/chat/completions", TeamChat), ("/v1/responses", TeamResponse)):
        bodies[path] = (team_class, *bodies[path])
    classes = {cls for choices in bodies.values() for cls in choices}
    names, definitions = models_json_schema(
        [(cls, "validation") for cls in classes], ref_template=f"{_SCHEMAS}/{{model}}"
    )
    document["components"]["schemas"] |= definitions["$defs"]
    for cls in classes:
        schema = document["components"]["schemas"][cls.__name__]
        schema["properties"]["model"] = {"enum": [TEAM] if cls in (TeamChat, TeamResponse) else seats}
        schema["required"] = sorted({"model", *schema.get("required", ())})
    for path, choices in bodies.items():
        references = [names[cls, "validation"] for cls in choices]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"] = schema
