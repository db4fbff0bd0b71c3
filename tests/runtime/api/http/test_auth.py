"""Authorization of HTTP requests: tokens, scopes, and services that lose their tokens."""

import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from runtime.api.auth import PREFIX, Scope, Tokens
from runtime.api.http.auth import gate_for
from runtime.errors import ConfigError
from tests.runtime.api.http.conftest import Start, configured

ROUTES = {
    Scope.READ: [
        ("GET", "/jobs"),
        ("GET", "/engines"),
        ("GET", "/control"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
    ],
    Scope.SUBMIT: [("POST", "/jobs"), ("POST", "/v1/chat/completions"), ("POST", "/jobs/x/cancel")],
    Scope.CONTROL: [("PATCH", "/control"), ("PUT", "/control/pins/solver"), ("DELETE", "/control/pins/solver")],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The token file of the services that `start` starts."""
    return tmp_path / "tokens.json"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_each_route_needs_a_token_with_its_scope(start: Start, path: Path) -> None:
    served = await start()
    secrets = {scope: Tokens(path).add(f"{scope} only", (scope,)) for scope in Scope}
    for required, routes in ROUTES.items():
        for method, route in routes:
            without = await served.client.request(method, route)
            assert without.status_code == 401, route
            assert without.headers["www-authenticate"] == "Bearer"
            unknown = await served.client.request(method, route, headers=bearer(f"{PREFIX}guess"))
            assert unknown.status_code == 401
            for scope, secret in secrets.items():
                response = await served.client.request(method, route, headers=bearer(secret))
                assert (response.status_code == 403) is (scope is not required), (route, scope, response.text)


async def test_health_needs_no_token(start: Start, path: Path) -> None:
    served = await start()
    Tokens(path).add("me", (Scope.READ,))
    assert (await served.client.get("/health")).status_code == 200


async def test_removed_token_stops_working(start: Start, path: Path) -> None:
    served = await start()
    secret = Tokens(path).add("me", (Scope.READ,))
    Tokens(path).add("you", (Scope.READ,))
    assert (await served.client.get("/jobs", headers=bearer(secret))).status_code == 200
    remove(path)
    assert (await served.client.get("/jobs", headers=bearer(secret))).status_code == 401


async def test_secrets_are_not_logged(start: Start, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = await start()
    secret = Tokens(path).add("me", (Scope.READ,))
    for route in ("/jobs", "/control", "/nowhere", "/jobs?state=wrong"):
        await served.client.get(route, headers=bearer(secret))
    assert secret not in caplog.text


def test_service_beyond_localhost_needs_a_token_or_open(tmp_path: Path, path: Path) -> None:
    tokens = Tokens(path)
    beyond = configured(tmp_path, host="0.0.0.0").service
    gate_for(configured(tmp_path).service, tokens)
    gate_for(configured(tmp_path, host="0.0.0.0", open=True).service, tokens)
    with pytest.raises(ConfigError, match="troupe tokens add NAME"):
        gate_for(beyond, tokens)
    tokens.add("me", (Scope.READ,))
    gate_for(beyond, tokens)


def remove(path: Path) -> None:
    Tokens(path).remove("me")


def delete(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    path.write_text('{"tokens": [')


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


LOSSES: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "deleted": delete,
    "damaged": damage,
    "unreadable": replace_by_a_folder,
}
"""Ways in which a service can lose its tokens."""


async def statuses(client: httpx.AsyncClient, **headers: str) -> set[int]:
    """Return the statuses of all routes that need a token."""
    routes = [route for routes in ROUTES.values() for route in routes]
    responses = [await client.request(method, route, headers=headers) for method, route in routes]
    assert all(response.json()["error"]["message"] for response in responses)
    return {response.status_code for response in responses}


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("loss", LOSSES)
async def test_service_that_loses_its_tokens_rejects_every_request(
    start: Start, path: Path, host: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    headers = bearer(Tokens(path).add("me", tuple(Scope)))
    served = await start(host=host)
    assert (await served.client.get("/jobs")).status_code == 401
    assert (await served.client.get("/jobs", headers=headers)).status_code == 200
    LOSSES[loss](path)
    expected = 401 if loss in ("removed", "deleted") else 403
    assert await statuses(served.client) == {expected}
    assert await statuses(served.client, **headers) == {expected}
    message = (await served.client.get("/jobs")).json()["error"]["message"]
    assert ("troupe tokens add NAME" if expected == 401 else "its log names the file") in message
    assert str(path) not in message  # the message goes to clients without a valid token
    assert [str(path) in record.getMessage() for record in caplog.records if record.name == "runtime.api.auth"] == (
        [] if expected == 401 else [True]  # logged once, not at every request
    )
    assert (await served.client.get("/health")).status_code == 200


async def test_new_token_works_after_a_loss(start: Start, path: Path) -> None:
    Tokens(path).add("me", (Scope.READ,))
    served = await start(host="0.0.0.0")
    damage(path)
    assert (await served.client.get("/jobs")).status_code == 403
    delete(path)
    secret = Tokens(path).add("you", (Scope.READ,))
    assert (await served.client.get("/jobs", headers=bearer(secret))).status_code == 200


async def test_open_service_accepts_requests_once_its_last_token_is_removed(start: Start, path: Path) -> None:
    Tokens(path).add("me", (Scope.READ,))
    served = await start(host="0.0.0.0", open=True)
    assert (await served.client.get("/jobs")).status_code == 401
    remove(path)
    assert (await served.client.get("/jobs")).status_code == 200
    damage(path)  # a damaged file may hold tokens
    assert (await served.client.get("/jobs")).status_code == 403


async def test_local_service_is_open_until_its_first_token(start: Start, path: Path) -> None:
    served = await start()
    assert (await served.client.get("/jobs")).status_code == 200
    Tokens(path).add("me", (Scope.READ,))
    assert (await served.client.get("/jobs")).status_code == 401
    remove(path)
    assert (await served.client.get("/jobs")).status_code == 401
