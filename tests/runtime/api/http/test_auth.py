"""Who may do what, and what a request may be."""

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from runtime.api.auth import PREFIX, Gate, Scope, Tokens, Unguarded
from runtime.api.http.auth import guard
from runtime.cli.main import cli
from runtime.errors import ConfigError, Forbidden
from tests.runtime.api.http.conftest import Served, Start, configured

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


async def test_with_a_token_everything_needs_one_that_may(start: Start, tmp_path: Path) -> None:
    served = await start()
    secrets = {scope: Tokens(tmp_path / "tokens.json").add(f"{scope} only", (scope,)) for scope in Scope}
    for needed, routes in ROUTES.items():
        for method, path in routes:
            answer = await served.client.request(method, path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            wrong = await served.client.request(method, path, headers={"Authorization": f"Bearer {PREFIX}guess"})
            assert wrong.status_code == 401
            for scope, secret in secrets.items():
                answer = await served.client.request(method, path, headers={"Authorization": f"Bearer {secret}"})
                assert (answer.status_code == 403) is (scope is not needed), (path, scope, answer.text)
    assert (await served.client.get("/health")).status_code == 200  # for those who watch over it
    Tokens(tmp_path / "tokens.json").remove("read only")
    gone = await served.client.get("/jobs", headers={"Authorization": f"Bearer {secrets[Scope.READ]}"})
    assert gone.status_code == 401


async def test_no_token_is_in_a_log(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = await start()
    secret = Tokens(tmp_path / "tokens.json").add("me", (Scope.READ,))
    for path in ("/jobs", "/control", "/nowhere", "/jobs?state=wrong"):
        await served.client.get(path, headers={"Authorization": f"Bearer {secret}"})
    assert secret not in caplog.text


def test_tokens_are_kept_as_hashes_by_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.json"
    secret = Tokens(path).add("me", (Scope.READ,))
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    gate = Gate(Tokens(path), Unguarded.NEVER)
    assert gate.name(secret) == "me"
    gate.check(secret, Scope.READ)
    with pytest.raises(Forbidden, match="'me' may read; this needs control"):
        gate.check(secret, Scope.CONTROL)
    with pytest.raises(ConfigError, match="there is a token 'me' already"):
        Tokens(path).add("me", (Scope.READ,))
    with pytest.raises(ConfigError, match="there is no token 'you'; there are me"):
        Tokens(path).remove("you")
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a file of tokens"):
        Tokens(path)


def test_a_service_beyond_localhost_starts_only_with_a_token_or_open(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    beyond = configured(tmp_path, host="0.0.0.0").service
    guard(configured(tmp_path).service, tokens)
    guard(configured(tmp_path, host="0.0.0.0", open=True).service, tokens)
    with pytest.raises(ConfigError, match="troupe tokens add NAME"):
        guard(beyond, tokens)
    tokens.add("me", (Scope.READ,))
    guard(beyond, tokens)


def remove(path: Path) -> None:
    Tokens(path).remove("me")


def damage(path: Path) -> None:
    path.write_text('{"tokens": [')


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


LOSSES: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "vanished": Path.unlink,
    "damaged": damage,
    "unreadable": replace_by_a_folder,
}


async def statuses(client: httpx.AsyncClient, **headers: str) -> set[int]:
    """What every route that needs a token answers."""
    asked = [route for routes in ROUTES.values() for route in routes]
    answers = [await client.request(method, path, headers=headers) for method, path in asked]
    assert all(answer.json()["error"]["message"] for answer in answers)
    return {answer.status_code for answer in answers}


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("loss", LOSSES)
async def test_a_service_that_loses_its_tokens_lets_nobody_in(
    start: Start, tmp_path: Path, host: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens.json"
    bearer = {"Authorization": f"Bearer {Tokens(path).add('me', tuple(Scope))}"}
    served = await start(host=host)
    assert (await served.client.get("/jobs")).status_code == 401
    assert (await served.client.get("/jobs", headers=bearer)).status_code == 200
    LOSSES[loss](path)
    expected = 401 if loss in ("removed", "vanished") else 403
    assert await statuses(served.client) == {expected}
    assert await statuses(served.client, **bearer) == {expected}
    message = (await served.client.get("/jobs")).json()["error"]["message"]
    assert ("troupe tokens add NAME" if expected == 401 else "its log names the file") in message
    assert str(path) not in message  # whoever asks is nobody that we know
    assert [str(path) in record.getMessage() for record in caplog.records if record.name == "runtime.api.auth"] == (
        [] if expected == 401 else [True]  # once, not at every request
    )
    assert (await served.client.get("/health")).status_code == 200


async def test_a_new_token_lets_its_holder_in_after_a_loss(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    Tokens(path).add("me", (Scope.READ,))
    served = await start(host="0.0.0.0")
    damage(path)
    assert (await served.client.get("/jobs")).status_code == 403
    path.unlink()
    secret = Tokens(path).add("you", (Scope.READ,))
    answer = await served.client.get("/jobs", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 200


async def test_an_open_service_opens_when_its_last_token_is_removed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    Tokens(path).add("me", (Scope.READ,))
    served = await start(host="0.0.0.0", open=True)
    assert (await served.client.get("/jobs")).status_code == 401
    remove(path)
    assert (await served.client.get("/jobs")).status_code == 200
    damage(path)  # it may hold tokens: nobody knows
    assert (await served.client.get("/jobs")).status_code == 403


async def test_a_local_service_without_tokens_is_open_until_its_first(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    served = await start()
    assert (await served.client.get("/jobs")).status_code == 200
    Tokens(path).add("me", (Scope.READ,))
    assert (await served.client.get("/jobs")).status_code == 401
    remove(path)
    assert (await served.client.get("/jobs")).status_code == 401


def test_the_command_warns_when_the_last_token_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    run = CliRunner().invoke
    for name in ("one", "two"):
        assert run(cli, ["tokens", "add", name]).exit_code == 0
    assert run(cli, ["tokens", "remove", "one"]).stderr == ""
    last = run(cli, ["tokens", "remove", "two"])
    assert (last.exit_code, "refuses every request until you add one" in last.stderr) == (0, True)


async def test_a_name_that_is_not_ours_is_refused(served: Served) -> None:
    """What a page of elsewhere would come with, had its name been pointed here."""
    for host, status in (("evil.example", 400), ("localhost:8000", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        answer = await served.client.get("/health", headers={"Host": host})
        assert answer.status_code == status, host


async def test_bodies_have_a_limit(start: Start) -> None:
    served = await start(body_max_bytes=1000)
    large = b'{"problem": "' + b"1" * 2000 + b'"}'
    headers = {"content-type": "application/json"}
    assert (await served.client.post("/jobs", content=large, headers=headers)).status_code == 413

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    streamed = await served.client.post("/jobs", content=pieces(), headers=headers)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (413, 413)


async def test_no_page_of_elsewhere_may_read(served: Served) -> None:
    answer = await served.client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
