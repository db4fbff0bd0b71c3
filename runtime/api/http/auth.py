"""HTTP authorization: the gate that a service's configuration asks for, and the dependency that checks a request."""

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.datastructures import Headers

from runtime.api.auth import Gate, OpenAccess, Scope, Tokens
from runtime.config import Service
from runtime.errors import ConfigError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def gate_for(service: Service, tokens: Tokens) -> Gate:
    """Return the gate for a service.

    Raises ConfigError if the service listens beyond localhost, has no tokens, and is not configured as `open`.
    """
    if service.open:
        return Gate(tokens, OpenAccess.ALWAYS)
    if service.host in LOCAL_HOSTS:
        return Gate(tokens, OpenAccess.UNTIL_FIRST_TOKEN)
    if not tokens.all:
        raise ConfigError(
            f"service.host: {service.host} is reachable beyond localhost, but no token exists, so anyone who reaches it"
            " would have full control; create a token with `troupe tokens add NAME`, or set `service.open: true`"
        )
    return Gate(tokens, OpenAccess.NEVER)


def bearer_secret(headers: Headers) -> str | None:
    """Return the secret of a request's token, or None if it sends none.

    It is a bearer token, or, as Anthropic's clients send it, the header `x-api-key`.
    """
    kind, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key")


def require(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Return a FastAPI dependency that requires a token with this scope."""

    async def check(request: Request) -> None:
        gate: Gate = request.app.state.gate
        gate.check(bearer_secret(request.headers), scope)

    return check
