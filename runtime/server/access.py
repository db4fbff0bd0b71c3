"""The condition of a route: a token that may."""

from collections.abc import Awaitable, Callable

from fastapi import Request

from runtime.access import Scope, Tokens


def may(scope: Scope) -> Callable[[Request], Awaitable[None]]:
    """A route's condition: that the request's token may do this."""

    async def check(request: Request) -> None:
        tokens: Tokens = request.app.state.tokens
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        tokens.check(secret.strip() if kind.lower() == "bearer" else None, scope)

    return check


__all__ = ["Scope", "Tokens", "may"]
