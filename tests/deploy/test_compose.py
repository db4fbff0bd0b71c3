"""Docker Compose: the files agree with each other, with the configurations and with the broker."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt
import pytest
import yaml

from runtime import config
from scripts.mosquitto import SAMPLE, free_port
from tests.deploy.files import COMPOSE, DEPLOY, GPU, ROOT, VARIANTS, loaded, mounts, services
from tests.programs import MOSQUITTO, needs

VARIANT = pytest.mark.parametrize("variant", list(VARIANTS))
SECRETS = Path("/run/secrets")
"""Where Compose mounts the secrets of a service."""


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(DEPLOY.rglob("*")) if path.suffix in (".yaml", ".yml", ".json")],
    ids=lambda path: path.name,
)
def test_file_parses(path: Path) -> None:
    assert loaded(path)


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    text = (DEPLOY / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    named = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    files = [name for name in named if "localhost" not in name]
    assert len(links) >= 2
    assert len(files) > 8
    assert [name for name in (*links, *files) if not (DEPLOY / name).exists()] == []


@VARIANT
def test_every_mounted_file_exists(variant: str) -> None:
    volumes = loaded(COMPOSE)["volumes"]
    for service in services(variant).values():
        for source in mounts(service).values():
            assert (DEPLOY / source).exists() if source.startswith(".") else source in volumes, source


@VARIANT
def test_ports_are_published_on_localhost_only(variant: str) -> None:
    ports = [port for service in services(variant).values() for port in service["ports"]]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


@VARIANT
def test_every_service_has_its_secrets(variant: str) -> None:
    declared = loaded(COMPOSE)["secrets"]
    for service in services(variant).values():
        assert set(service["secrets"]) <= declared.keys()
    password = services(variant)["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert Path(password).parent == SECRETS
    assert Path(password).name in services(variant)["grafana"]["secrets"]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {Path(secret["file"]).parent.name + "/" for secret in declared.values()} <= set(ignored)


@VARIANT
def test_image_is_built_for_the_variant(variant: str) -> None:
    service = services(variant)["troupe"]
    assert service["image"] == f"troupe:{variant}"
    assert service["build"]["args"] == {"EXTRA": variant}
    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_only_the_gpu_variant_reserves_a_gpu() -> None:
    assert "deploy" not in services("cpu")["troupe"]
    [device] = services("cuda")["troupe"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@VARIANT
def test_configuration_reaches_the_broker_and_listens_for_other_containers(variant: str) -> None:
    service = services(variant)["troupe"]
    path = service["command"][service["command"].index("--config") + 1]
    chosen = config.load(str(DEPLOY / mounts(service)[path]))
    assert (chosen.service.host, chosen.service.port, chosen.service.open) == ("0.0.0.0", 8000, False)
    assert chosen.mqtt is not None
    assert chosen.mqtt.host in services(variant)
    assert f"listener {chosen.mqtt.port}" in (DEPLOY / "mosquitto.conf").read_text().splitlines()
    assert chosen.mqtt.password_file is not None
    assert Path(chosen.mqtt.password_file).parent == SECRETS
    assert Path(chosen.mqtt.password_file).name in service["secrets"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= chosen.service.drain_s + 30


def test_broker_reads_the_shared_configuration() -> None:
    own = (DEPLOY / "mosquitto.conf").read_text()
    mounted = {target: (DEPLOY / source).resolve() for target, source in mounts(services("cpu")["mosquitto"]).items()}
    [folder] = re.findall(r"^include_dir (.+)$", own, re.MULTILINE)
    assert mounted[f"{folder}/mosquitto.conf"] == SAMPLE
    [stored] = re.findall(r"^persistence_location (.+)$", SAMPLE.read_text(), re.MULTILINE)
    assert stored.rstrip("/") in mounted
    [passwords] = re.findall(r"^password_file (.+)$", own, re.MULTILINE)
    assert str(Path(passwords).parent) in mounted


@needs(MOSQUITTO, "mosquitto")
async def test_broker_wants_a_password_from_other_containers(tmp_path: Path) -> None:
    async with broker(tmp_path) as (inside, published):
        async with aiomqtt.Client("127.0.0.1", inside):
            pass
        async with aiomqtt.Client("127.0.0.1", published, username="troupe", password="secret"):
            pass
        for user, password in ((None, None), ("troupe", "wrong")):
            with pytest.raises(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", published, username=user, password=password):
                    pass


@asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[tuple[int, int]]:
    """Run mosquitto as compose.yaml does; yield the ports of its own and of its published listener."""
    assert MOSQUITTO is not None
    inside, published = free_port(), free_port()
    for name in ("shared", "data"):
        (folder / name).mkdir()
    shared = SAMPLE.read_text().replace("listener 1883", f"listener {inside}").replace("user mosquitto", "user root")
    (folder / "shared" / "mosquitto.conf").write_text(shared.replace("/var/lib/mosquitto/", f"{folder}/data/"))
    own = (DEPLOY / "mosquitto.conf").read_text().replace("listener 1884", f"listener {published}")
    own = own.replace("/etc/troupe/shared", f"{folder}/shared").replace("/mosquitto/data", f"{folder}/data")
    (folder / "mosquitto.conf").write_text(own)
    make = ("mosquitto_passwd", "-c", "-b", f"{folder}/data/passwords", "troupe", "secret")
    assert await (await asyncio.create_subprocess_exec(*make)).wait() == 0
    process = await asyncio.create_subprocess_exec(
        MOSQUITTO, "-c", str(folder / "mosquitto.conf"), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(60):
            for port in (inside, published):
                await _until_it_listens(port)
        yield inside, published
    finally:
        process.terminate()
        await process.wait()


async def _until_it_listens(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        return


def _compose_is_missing() -> bool:
    try:
        return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0
    except FileNotFoundError:
        return True


@pytest.mark.skipif(_compose_is_missing(), reason="`docker compose` is not installed")
@VARIANT
def test_compose_accepts_the_files(variant: str) -> None:
    files = [option for path in VARIANTS[variant] for option in ("-f", str(path))]
    done = subprocess.run(["docker", "compose", *files, "config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged = yaml.safe_load(done.stdout)["services"]["troupe"]
    assert merged["image"] == f"troupe:{variant}"
    configurations = [mount["source"] for mount in merged["volumes"] if mount["target"] == "/etc/troupe/team.yaml"]
    assert configurations == [str(DEPLOY / ("team.gpu.yaml" if GPU in VARIANTS[variant] else "team.yaml"))]
