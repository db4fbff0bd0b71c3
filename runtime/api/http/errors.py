"""Error responses: the HTTP status of each error, and a body in OpenAI's format for every route."""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from runtime.errors import (
    Busy,
    ConfigError,
    EngineError,
    Forbidden,
    InputError,
    JournalError,
    NotFound,
    PluginError,
    RequestRefused,
    TroupeError,
)


class RequestBlocked(TroupeError):
    """A request that the limits reject before it reaches a route; `status` is the HTTP status to answer with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JobFailed(TroupeError):
    """A job that a client waited for ended without an answer."""


class ErrorDetail(BaseModel):
    """The error object in the body of a failed request."""

    message: str = Field(description="What is wrong, and what would be right.")
    type: str = Field(description="The kind of error, such as `invalid_request_error` or `server_error`.")
    param: str | None = Field(description="The request field at fault, if one field is.")
    code: int = Field(description="The HTTP status.")


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is invalid. The message names the field.",
        401: "A valid token is required.",
        403: "The token lacks the required scope, or the request comes from a page of another site.",
        404: "No such job, model or engine exists.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        422: "The job ended without an answer.",
        429: "The client sent too many requests.",
        503: "The service cannot do this now. Try again later.",
    }.items()
}
"""The error responses that every route documents."""


def status_of(error: TroupeError) -> int:
    """Return the HTTP status for an error."""
    match error:
        case InputError() | ConfigError() | RequestRefused():
            return 400
        case Forbidden():
            return 403 if error.known else 401
        case NotFound():
            return 404
        case JobFailed():
            return 422
        case RequestBlocked():
            return error.status
        case Busy() | JournalError() | EngineError():
            return 503
        case PluginError():
            return 500
    return 400


def error_body(error: TroupeError) -> dict[str, Any]:
    """Return the response body for an error. A message such as `seed: must be ...` sets `param` to `seed`."""
    message = str(error)
    prefix, colon, _ = message.partition(": ")
    names_field = colon and prefix.replace(".", "").replace("_", "").isalnum()
    return _body(status_of(error), message, prefix if names_field else None)


def _body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    default = "invalid_request_error" if status < 500 else "server_error"
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return {"error": {"message": message, "type": kinds.get(status, default), "param": field, "code": status}}


def register(app: FastAPI) -> None:
    """Make the application answer every error in this format."""
    app.add_exception_handler(TroupeError, _troupe_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _troupe_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TroupeError)
    status = status_of(error)
    retry_s = error.retry_s if isinstance(error, Busy) else 1.0
    headers = {"Retry-After": str(math.ceil(retry_s))} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    messages = []
    first_field = None
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"] if part != "body")
        message = detail["msg"] if detail["type"] != "json_invalid" else f"not JSON: {detail['ctx']['error']}"
        messages.append(f"{field or 'the body'}: {message[:1].lower()}{message[1:]}"[:500])
        first_field = first_field or field or None
    return JSONResponse(_body(400, "; ".join(messages[:5]), first_field), 400)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(_body(error.status_code, str(error.detail)), error.status_code, error.headers)
