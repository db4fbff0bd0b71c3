"""Connections with TLS and a password, and files of them that cannot be read."""

import asyncio
import datetime
import ipaddress
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from runtime.api.serve import serving
from runtime.config import Mqtt
from runtime.errors import ConfigError
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from scripts.mosquitto import Mosquitto
from tests.runtime.api.mqtt.conftest import with_broker, with_mosquitto

PASSWORD = "open-sesame"


def certify(folder: Path) -> None:
    """Write a self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[Mqtt]:
    certify(tmp_path)
    command = ("mosquitto_passwd", "-b", "-c", str(tmp_path / "passwords"), "troupe", PASSWORD)
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    settings = {"certfile": "cert.pem", "keyfile": "key.pem", "password_file": "passwords"}
    more = "".join(f"{key} {tmp_path / file}\n" for key, file in settings.items())
    broker = Mosquitto(tmp_path, anonymous=False, more=f"\n{more}")
    async with broker:
        yield Mqtt(
            port=broker.port,
            username="troupe",
            password_file=str(tmp_path / "password"),
            ca_file=str(tmp_path / "cert.pem"),
        )


async def first_report(folder: Path, mqtt: Mqtt) -> str:
    """Start a service and return its first report about the broker."""
    config = with_broker(folder, mqtt)
    team = assemble(config)
    reports: asyncio.Queue[str] = asyncio.Queue()
    async with serving(config, team, partial(start_modelled_team, config, team, time_scale=0), tell=reports.put_nowait):
        async with asyncio.timeout(60):
            return await reports.get()


@with_mosquitto
async def test_the_right_password_and_ca_connect(
    tmp_path: Path, secure: Mqtt, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert (await first_report(tmp_path, secure)).endswith("connected")
    assert PASSWORD not in caplog.text


@with_mosquitto
async def test_a_wrong_password_or_ca_is_reported_and_tried_again(tmp_path: Path, secure: Mqtt) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("abracadabra\n")
    report = await first_report(tmp_path, secure.model_copy(update={"password_file": str(wrong)}))
    assert "authori" in report.lower()
    assert "trying again" in report
    report = await first_report(tmp_path, secure.model_copy(update={"ca_file": None, "tls": True}))
    assert "certificate verify failed" in report


async def test_missing_files_are_reported_before_anything_starts(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for mqtt, key in ((Mqtt(password_file=nowhere), "password_file"), (Mqtt(ca_file=nowhere), "ca_file")):
        with pytest.raises(ConfigError, match=f"mqtt.{key}: .*nowhere"):
            await first_report(tmp_path, mqtt)
