"""Who may use a route, and who may use the service at all."""

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.datastructures import Headers

from runtime.api.auth import Gate, Scope, Tokens, Unguarded
from runtime.config import Service
from runtime.errors import ConfigError

LOCAL = ("localhost", "127.0.0.1", "::1")


def guard(service: Service, tokens: Tokens) -> Gate:
    """Return the gate of a service, for as long as it runs.

    Raises ConfigError if the service listens beyond localhost, has no token, and is not told to be `open`.
    """
    if service.open:
        return Gate(tokens, Unguarded.ALWAYS)
    if service.host in LOCAL:
        return Gate(tokens, Unguarded.UNTIL_A_TOKEN)
    if not tokens.all:
        raise ConfigError(
            f"service.host: {service.host} is beyond localhost, and there is no token: whoever reaches it could do"
            " everything. Make one with `troupe tokens add NAME`, or say `open: true` in the section service"
        )
    return Gate(tokens, Unguarded.NEVER)


def secret_of(headers: Headers) -> str | None:
    """Return the bearer token that a request sends, None if it sends none."""
    kind, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


def may(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """Return a FastAPI dependency that requires a token with this scope."""

    async def check(request: Request) -> None:
        gate: Gate = request.app.state.gate
        gate.check(secret_of(request.headers), scope)

    return check


__all__ = ["LOCAL", "Gate", "Scope", "Tokens", "guard", "may", "secret_of"]
