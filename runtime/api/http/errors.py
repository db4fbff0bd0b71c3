"""Errors as answers: OpenAI's form, for all routes."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
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


class Refused(TroupeError):
    """A request that no route sees: it is too large, comes too soon, or comes from where it must not."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class JobFailed(TroupeError):
    """A job that was waited for has no answer."""


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field, where it is one."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "the request is wrong; the message names the field",
        401: "a token is needed",
        403: "the token may not do this, or a page of another site asks",
        404: "there is no such thing",
        413: "the body is too large",
        422: "the job has no answer",
        429: "too many requests",
        503: "not now; try again later",
    }.items()
}
"""What every route may answer besides success."""


def status_of(error: TroupeError) -> int:
    """The HTTP status that says an error."""
    match error:
        case InputError() | ConfigError() | RequestRefused():
            return 400
        case Forbidden():
            return 403 if error.known else 401
        case NotFound():
            return 404
        case JobFailed():
            return 422
        case Refused():
            return error.status
        case Busy() | JournalError() | EngineError():
            return 503
        case PluginError():
            return 500
    return 400


def error_body(error: TroupeError) -> dict[str, Any]:
    """The body that says an error."""
    text = str(error)
    field, colon, _ = text.partition(": ")
    field = field if colon and field.replace(".", "").replace("_", "").isalnum() and " " not in field else ""
    return _body(status_of(error), text, field or None)


def _body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status, kind)
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


def register(app: FastAPI) -> None:
    """Let the application answer every error so."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TroupeError)
        status = status_of(error)
        headers = {"Retry-After": "1"} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(error), status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = []
        field = None
        for one in error.errors():
            place = ".".join(str(part) for part in one["loc"] if part != "body")
            message = one["msg"] if one["type"] != "json_invalid" else f"not JSON: {one['ctx']['error']}"
            lines.append(f"{place or 'the body'}: {message[:1].lower()}{message[1:]}"[:500])
            field = field or place or None
        return JSONResponse(_body(400, "; ".join(lines[:5]), field), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    app.add_exception_handler(TroupeError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
