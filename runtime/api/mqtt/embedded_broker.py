"""A broker inside this process, for a first try: on localhost, with a password, MQTT 3.1.1.

Not for production: it keeps what a stalled subscriber does not take in memory without bound, grants shared
subscriptions and delivers nothing to them, and forgets everything when it ends. mosquitto is (configs/mosquitto.conf).
"""

import hmac
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from amqtt.broker import Broker
from amqtt.errors import AMQTTError
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

from runtime.config import Mqtt
from runtime.errors import ConfigError

USER = "troupe"
PASSWORD_FILE = "mqtt-password"


@asynccontextmanager
async def broker(mqtt: Mqtt, home: Path) -> AsyncIterator[Mqtt]:
    """The broker on the configured port of localhost; how it is reached. Its password is made once, and is kept in a
    file that its owner alone reads. Raises ConfigError where the port is taken."""
    password_file = home / PASSWORD_FILE
    reached = mqtt.model_copy(
        update={
            "host": "127.0.0.1",
            "username": USER,
            "password_file": str(password_file),
            "tls": False,
            "ca_file": None,
        }
    )
    settings = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{mqtt.port}"}},
        "plugins": {f"{__name__}.{OnePassword.__name__}": {"username": USER, "password": _password(password_file)}},
    }
    running = Broker(settings)
    try:
        await running.start()
    except (AMQTTError, OSError) as error:
        raise ConfigError(f"mqtt.port: no broker on 127.0.0.1:{mqtt.port}: {error.__cause__ or error}") from None
    try:
        yield reached
    finally:
        await running.shutdown()


class OnePassword(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is not analysed
    """One user, one password."""

    @dataclass
    class Config:
        """Both of them."""

        username: str
        password: str

    async def authenticate(self, *, session: Session) -> bool:
        """Whether a client has said them."""
        wanted = self.context.config
        given = f"{session.username}\n{session.password}".encode()
        return hmac.compare_digest(given, f"{wanted.username}\n{wanted.password}".encode())


def _password(file: Path) -> str:
    """What the file says, which is made where there is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as new:
                new.write(secrets.token_urlsafe(24) + "\n")
        return file.read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        raise ConfigError(f"{file}: {error}") from None
