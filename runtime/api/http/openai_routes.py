"""Routes of OpenAI's API. The model `team` runs a job; the name of a seat is the model of that seat's engine."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from runtime.api.auth import Scope
from runtime.api.http import engine_models, team_model
from runtime.api.http.auth import require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.connection import cancel_on_disconnect
from runtime.api.http.errors import ERRORS
from runtime.api.http.openai_schemas import ChatRequest, CompletionRequest
from runtime.api.http.team_model import TEAM
from runtime.errors import InputError, NotFound

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)
_READ = [Depends(require(Scope.READ))]
_SUBMIT = [Depends(require(Scope.SUBMIT))]


@router.get("/models", dependencies=_READ)
async def list_models(backend: BackendDep) -> dict[str, Any]:
    """List the models: `team`, and each of its seats."""
    return {"object": "list", "data": [_model_object(name, backend) for name in _models(backend)]}


@router.get("/models/{model}", dependencies=_READ)
async def retrieve_model(model: str, backend: BackendDep) -> dict[str, Any]:
    """Retrieve a model."""
    _check_model(model, backend)
    return _model_object(model, backend)


@router.post("/chat/completions", dependencies=_SUBMIT, response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, backend: BackendDep) -> Response:
    """Create a chat completion.

    The model `team` solves the problem in the user's message: its deliberation is the message's `reasoning`, and its
    answer the `content`. The name of a seat sends the chat to that seat's engine.
    """
    _check_model(body.model, backend)
    answer_chat = team_model.chat if body.model == TEAM else engine_models.chat
    return await cancel_on_disconnect(request, answer_chat(body, backend))


@router.post("/completions", dependencies=_SUBMIT, response_model=None)
async def create_completion(body: CompletionRequest, request: Request, backend: BackendDep) -> Response:
    """Create a completion: a seat's engine continues each prompt."""
    _check_model(body.model, backend)
    if body.model == TEAM:
        raise InputError(
            f"model: `{TEAM}` answers chats only; use /v1/chat/completions, or send the prompt to one of its seats"
        )
    return await cancel_on_disconnect(request, engine_models.complete(body, backend))


def _models(backend: Backend) -> tuple[str, ...]:
    return (TEAM, *backend.team.seats)


def _check_model(name: str, backend: Backend) -> None:
    if name not in _models(backend):
        raise NotFound(f"there is no model {name!r}; the models are {', '.join(_models(backend))}")


def _model_object(name: str, backend: Backend) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "troupe"}
    if name != TEAM:
        entry["root"] = backend.config.engines[backend.team.seats[name].engine].model
    return entry
