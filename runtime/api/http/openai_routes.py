"""Routes of OpenAI's and Anthropic's APIs. The model `team` runs a job; the name of a seat is that seat's engine."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import Response
from pydantic import AfterValidator

from runtime.api.auth import Scope
from runtime.api.http import team_model
from runtime.api.http.auth import require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.connection import cancel_on_disconnect
from runtime.api.http.errors import ERRORS
from runtime.api.http.team_requests import TEAM, TeamChat, TeamResponse
from runtime.errors import InputError, NotFound

router = APIRouter(tags=["OpenAI"], responses=ERRORS)
_READ = [Depends(require(Scope.READ))]
_SUBMIT = [Depends(require(Scope.SUBMIT))]


def _check_writable(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body that can be written as JSON again, because answers and errors repeat parts of it.

    Raises InputError, which names the key. Python's reader also accepts what no client could read.
    """
    for key, value in body.items():
        name = key if key.isidentifier() else repr(key)
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{name}: it has half of a surrogate pair; send whole characters") from None
        except ValueError:
            raise InputError(f"{name}: it has a number that is not finite; JSON has only finite ones") from None
        except RecursionError:
            raise InputError(f"{name}: its lists or objects are nested too deep") from None
    return body


JsonObject = Annotated[dict[str, Any], Body(), AfterValidator(_check_writable)]


@router.get("/v1/models", dependencies=_READ)
async def list_models(backend: BackendDep) -> dict[str, Any]:
    """List the models: `team`, and each of its seats."""
    return {"object": "list", "data": [_model_object(name, backend) for name in _models(backend)]}


@router.get("/v1/models/{model}", dependencies=_READ)
async def retrieve_model(model: str, backend: BackendDep) -> dict[str, Any]:
    """Retrieve a model."""
    _check_model(model, backend)
    return _model_object(model, backend)


@router.post("/v1/chat/completions", dependencies=_SUBMIT, response_model=None)
async def create_chat_completion(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Create a chat completion.

    The model `team` solves the problem in the user's message: its deliberation is the message's `reasoning`, and its
    answer the `content`. The name of a seat sends the chat to that seat's engine.
    """
    if _model(body, backend) == TEAM:
        work = team_model.chat(TeamChat.read(body, _first_seat(backend)), backend)
    else:
        work = (await backend.seat_model(body["model"])).chat(body)
    return await cancel_on_disconnect(request, work)


@router.post("/v1/responses", dependencies=_SUBMIT, response_model=None)
async def create_response(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Create a response. The models are those of a chat completion. Responses are not stored."""
    if _model(body, backend) == TEAM:
        work = team_model.respond(TeamResponse.read(body, _first_seat(backend)), backend)
    else:
        work = (await backend.seat_model(body["model"])).respond(body)
    return await cancel_on_disconnect(request, work)


@router.post("/v1/completions", dependencies=_SUBMIT, response_model=None)
async def create_completion(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Create a completion: a seat's engine continues each prompt."""
    return await cancel_on_disconnect(request, (await _seat_model(body, backend)).complete(body))


@router.post("/v1/messages", dependencies=_SUBMIT, response_model=None, tags=["Anthropic"])
async def create_message(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Create a message with a seat's engine, as Anthropic's API does."""
    return await cancel_on_disconnect(request, (await _seat_model(body, backend)).message(body))


@router.post("/v1/messages/count_tokens", dependencies=_SUBMIT, response_model=None, tags=["Anthropic"])
async def count_message_tokens(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Count the tokens of a message's prompt, as Anthropic's API does."""
    return await cancel_on_disconnect(request, (await _seat_model(body, backend)).count_tokens(body))


@router.post("/tokenize", dependencies=_SUBMIT, response_model=None, tags=["vLLM"])
async def tokenize(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Tokenize a prompt or a chat, as vLLM's server does."""
    return await cancel_on_disconnect(request, (await _seat_model(body, backend)).tokenize(body))


@router.post("/detokenize", dependencies=_SUBMIT, response_model=None, tags=["vLLM"])
async def detokenize(body: JsonObject, request: Request, backend: BackendDep) -> Response:
    """Turn tokens into text, as vLLM's server does."""
    return await cancel_on_disconnect(request, (await _seat_model(body, backend)).detokenize(body))


def _models(backend: Backend) -> tuple[str, ...]:
    return (TEAM, *backend.team.seats)


def _first_seat(backend: Backend) -> str:
    return next(iter(backend.team.seats))


def _check_model(name: str, backend: Backend) -> None:
    if name not in _models(backend):
        raise NotFound(f"there is no model {name!r}; the models are {', '.join(_models(backend))}")


def _model(body: dict[str, Any], backend: Backend) -> str:
    """Return the model that a body names. Raises InputError or NotFound."""
    name = body.get("model")
    if not isinstance(name, str):
        raise InputError(f"model: give the name of a model as a text; the models are {', '.join(_models(backend))}")
    _check_model(name, backend)
    return name


async def _seat_model(body: dict[str, Any], backend: Backend) -> Any:
    """Return the seat's model that a body names. Raises InputError, NotFound or Busy."""
    if _model(body, backend) == TEAM:
        raise InputError(
            f"model: `{TEAM}` answers chat completions and responses only; send the request to one of its seats, such "
            f"as {_first_seat(backend)!r}"
        )
    return await backend.seat_model(body["model"])


def _model_object(name: str, backend: Backend) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "troupe"}
    if name != TEAM:
        entry["root"] = backend.config.engines[backend.team.seats[name].engine].model
    return entry
