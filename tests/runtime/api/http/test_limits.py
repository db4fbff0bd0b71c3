"""How often a client may ask, on a clock of the test's."""

from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from runtime.api.auth import PREFIX, Gate, Tokens, Unguarded
from runtime.api.auth import Scope as May
from runtime.api.http import limits
from runtime.api.http.limits import Limits
from tests.runtime.api.http.conftest import Start


class Clock:
    """Seconds, which pass only if they are told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Asked:
    """An application behind limits, which allow two requests a second, and those who ask it."""

    def __init__(self, folder: Path) -> None:
        self.tokens = Tokens(folder / "tokens.json")
        self.clock = Clock()
        gate = Gate(self.tokens, Unguarded.ALWAYS)
        self.limits = Limits(self._answer, body_bytes=1000, gate=gate, per_s=2, clock=self.clock)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(Request(scope).method)(scope, receive, send)

    async def by(self, address: str = "192.0.2.1", token: str | None = None) -> int:
        """Ask once, and return the status of the answer."""
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
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


async def test_a_client_that_asks_too_often_waits(asked: Asked) -> None:
    assert [await asked.by() for _ in range(4)] == [200, 200, 429, 429]
    asked.clock.now_s += 0.5
    assert [await asked.by() for _ in range(2)] == [200, 429]
    asked.clock.now_s += 3600  # at most a second's worth is saved up
    assert [await asked.by() for _ in range(3)] == [200, 200, 429]


async def test_made_up_tokens_share_the_bucket_of_their_address(asked: Asked) -> None:
    assert [await asked.by(token=f"{PREFIX}{guess}") for guess in range(4)] == [200, 200, 429, 429]
    assert await asked.by() == 429
    assert await asked.by("192.0.2.2") == 200


async def test_a_token_has_a_bucket_of_its_own_wherever_it_comes_from(asked: Asked) -> None:
    mine, yours = asked.tokens.add("mine", (May.READ,)), asked.tokens.add("yours", (May.READ,))
    assert [await asked.by() for _ in range(3)] == [200, 200, 429]  # a proxy's address, say, is used up by others
    assert [await asked.by(token=mine) for _ in range(2)] == [200, 200]
    assert await asked.by("192.0.2.2", token=mine) == 429
    assert await asked.by(token=yours) == 200


async def test_a_token_named_like_an_address_is_not_that_address(asked: Asked) -> None:
    secret = asked.tokens.add("192.0.2.1", (May.READ,))
    assert [await asked.by(token=secret) for _ in range(3)] == [200, 200, 429]
    assert await asked.by("192.0.2.1") == 200


async def test_an_ipv6_client_is_its_network(asked: Asked) -> None:
    assert [await asked.by(f"2001:db8:0:1::{n}") for n in range(1, 4)] == [200, 200, 429]
    assert await asked.by("2001:db8:0:2::1") == 200
    assert [await asked.by(f"::ffff:192.0.2.{n}") for n in range(1, 4)] == [200, 200, 200]  # IPv4 by another name
    assert [await asked.by("192.0.2.3") for _ in range(2)] == [200, 429]
    assert [await asked.by(f"fe80::{n}%eth0") for n in range(1, 4)] == [200, 200, 429]


async def test_many_addresses_take_bounded_memory(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLIENTS", 100)
    for number in range(1000):
        await asked.by(f"10.0.{number // 256}.{number % 256}")
    assert len(asked.limits._buckets) == 100


async def test_a_forwarded_address_is_not_believed(start: Start) -> None:
    served = await start(requests_per_s=1e-6)
    answers = [
        await served.client.get("/health", headers={"X-Forwarded-For": f"192.0.2.{n}", "Authorization": f"Bearer {n}"})
        for n in range(3)
    ]
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert answers[-1].headers["retry-after"] == "1"
