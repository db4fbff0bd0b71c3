"""Limits on requests: host names, body sizes, and rates on a clock that the test controls."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from runtime.api.auth import PREFIX, Gate, OpenAccess, Tokens
from runtime.api.auth import Scope as TokenScope
from runtime.api.http import limits
from runtime.api.http.limits import Limits
from tests.runtime.api.http.conftest import Served, Start


class Clock:
    """A clock that advances only when a test advances it."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class LimitedApp:
    """An application behind limits that allow two requests a second."""

    def __init__(self, folder: Path) -> None:
        self.tokens = Tokens(folder / "tokens.json")
        self.clock = Clock()
        gate = Gate(self.tokens, OpenAccess.ALWAYS)
        self.limits = Limits(self._respond, body_max_bytes=1000, gate=gate, per_s=2, clock=self.clock)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(Request(scope).method)(scope, receive, send)

    async def get(self, address: str = "192.0.2.1", token: str | None = None) -> int:
        """Send a request from this address, and return the status of the response."""
        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": (address, 1)}
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.limits(scope, receive, send)
        return int(sent[0]["status"])


@pytest.fixture
def app(tmp_path: Path) -> LimitedApp:
    return LimitedApp(tmp_path)


async def test_rate_limit_rejects_requests_until_the_bucket_refills(app: LimitedApp) -> None:
    assert [await app.get() for _ in range(4)] == [200, 200, 429, 429]
    app.clock.now_s += 0.5
    assert [await app.get() for _ in range(2)] == [200, 429]
    app.clock.now_s += 3600  # the bucket holds at most one second's worth
    assert [await app.get() for _ in range(3)] == [200, 200, 429]


async def test_made_up_tokens_count_for_their_address(app: LimitedApp) -> None:
    assert [await app.get(token=f"{PREFIX}{guess}") for guess in range(4)] == [200, 200, 429, 429]
    assert await app.get() == 429
    assert await app.get("192.0.2.2") == 200


async def test_token_has_its_own_bucket_for_all_addresses(app: LimitedApp) -> None:
    mine, yours = app.tokens.add("mine", (TokenScope.READ,)), app.tokens.add("yours", (TokenScope.READ,))
    assert [await app.get() for _ in range(3)] == [200, 200, 429]  # others use up the address, such as a proxy's
    assert [await app.get(token=mine) for _ in range(2)] == [200, 200]
    assert await app.get("192.0.2.2", token=mine) == 429
    assert await app.get(token=yours) == 200


async def test_token_named_like_an_address_does_not_share_its_bucket(app: LimitedApp) -> None:
    secret = app.tokens.add("192.0.2.1", (TokenScope.READ,))
    assert [await app.get(token=secret) for _ in range(3)] == [200, 200, 429]
    assert await app.get("192.0.2.1") == 200


async def test_ipv6_addresses_share_the_bucket_of_their_network(app: LimitedApp) -> None:
    assert [await app.get(f"2001:db8:0:1::{n}") for n in range(1, 4)] == [200, 200, 429]
    assert await app.get("2001:db8:0:2::1") == 200
    assert [await app.get(f"::ffff:192.0.2.{n}") for n in range(1, 4)] == [200, 200, 200]  # IPv4-mapped addresses
    assert [await app.get("192.0.2.3") for _ in range(2)] == [200, 429]
    assert [await app.get(f"fe80::{n}%eth0") for n in range(1, 4)] == [200, 200, 429]


async def test_number_of_remembered_clients_is_bounded(app: LimitedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENTS_MAX", 100)
    for number in range(1000):
        await app.get(f"10.0.{number // 256}.{number % 256}")
    assert len(app.limits._buckets) == 100


async def test_forwarded_address_is_not_trusted_by_default(start: Start) -> None:
    served = await start(requests_per_s=1e-6)
    responses = [
        await served.client.get("/health", headers={"X-Forwarded-For": f"192.0.2.{n}", "Authorization": f"Bearer {n}"})
        for n in range(3)
    ]
    assert [response.status_code for response in responses] == [200, 429, 429]
    assert responses[-1].headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 400), ("localhost:8000", 200), ("[::1]:80", 200), ("127.0.0.1", 200)]
)
async def test_local_service_rejects_foreign_host_names(served: Served, host: str, status: int) -> None:
    """A page of another site sends its own host name if that name's DNS entry points to this machine."""
    response = await served.client.get("/health", headers={"Host": host})
    assert response.status_code == status


async def test_large_body_is_rejected_with_or_without_a_content_length(start: Start) -> None:
    served = await start(body_max_bytes=1000)
    large = b'{"problem": "' + b"1" * 2000 + b'"}'
    headers = {"content-type": "application/json"}
    assert (await served.client.post("/jobs", content=large, headers=headers)).status_code == 413

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    streamed = await served.client.post("/jobs", content=pieces(), headers=headers)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (413, 413)
