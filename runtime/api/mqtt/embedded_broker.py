"""An MQTT 3.1.1 broker inside the service's process, for a first try: on localhost, with a password.

Not for production. It queues messages for a slow subscriber in memory without bound, accepts shared subscriptions but
delivers nothing to them, and loses everything when it ends. Use mosquitto instead (configs/mosquitto.conf).
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
    """Run a broker on the configured port of localhost, and yield the settings with which clients reach it.

    The first call generates a password and keeps it in a file in `home` that only its owner can read. Raises
    ConfigError if the port is taken or the password file cannot be read or written.
    """
    password_file = home / PASSWORD_FILE
    client_settings = mqtt.model_copy(
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
        "plugins": {f"{__name__}.{PasswordPlugin.__name__}": {"username": USER, "password": _password(password_file)}},
    }
    running = Broker(settings)
    try:
        await running.start()
    except (AMQTTError, OSError) as error:
        raise ConfigError(
            f"mqtt.port: cannot start a broker on 127.0.0.1:{mqtt.port}: {error.__cause__ or error}; set a free port"
        ) from None
    try:
        yield client_settings
    finally:
        await running.shutdown()


class PasswordPlugin(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is not analysed
    """An amqtt plug-in that accepts one user name with one password."""

    @dataclass
    class Config:
        """The accepted credentials, which the name of this class makes amqtt fill from the plug-in's settings."""

        username: str
        password: str

    async def authenticate(self, *, session: Session) -> bool:
        """Return True if a client's credentials are the accepted ones."""
        accepted = self.context.config
        given = f"{session.username}\n{session.password}".encode()
        return hmac.compare_digest(given, f"{accepted.username}\n{accepted.password}".encode())


def _password(file: Path) -> str:
    """Return the password in the file. Generate one if there is no file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as new:
                new.write(secrets.token_urlsafe(24) + "\n")
        return file.read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        raise ConfigError(
            f"{file}: cannot read or write the embedded broker's password: {error}; delete the file to get a new one"
        ) from None
