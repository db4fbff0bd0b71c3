"""Exports to receivers that work, are away, hang or come back, and what the environment sets."""

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from runtime import config
from runtime.config import Config, Traces
from runtime.errors import ConfigError
from runtime.jobs.job import Job
from runtime.jobs.orchestrator import Orchestrator
from runtime.tracing import export
from runtime.tracing.export import SpanExport
from runtime.tracing.traced import traced
from scripts.mosquitto import free_port
from tests.runtime.fakes import embedded_team, engines
from tests.runtime.tracing.receiver import grpc_receiver, http_receiver

ROOT_SPAN = "invoke_workflow deliberate"
EXPORT_TIMEOUT_S = 10
"""The SDK's timeout. Whatever waits for an export that hangs takes at least as long."""


def exporting(**traces: str) -> Config:
    return config.load("embedded").model_copy(update={"traces": Traces.model_validate(traces)})


async def work(chosen: Config, jobs: int = 1) -> None:
    """Work jobs while their traces are exported. All of them have an answer."""
    async with traced(chosen) as tracing:
        orchestrator = Orchestrator(embedded_team(), await engines(), tracing.on_event)
        for number in range(jobs):
            assert (await orchestrator.run(Job(str(number), "12+7"))).answer == "19"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/collector/traces"])
async def test_http_gets_the_usual_path_unless_the_endpoint_has_one(path: str) -> None:
    with http_receiver() as receiver:
        await work(exporting(endpoint=receiver.url + path, protocol="http/protobuf"))
        assert len(receiver.named(ROOT_SPAN)) == 1
        assert set(receiver.paths) == {path if path.strip("/") else "/v1/traces"}


async def test_environment_names_the_service_and_adds_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=other")
    with grpc_receiver() as receiver:
        await work(exporting(endpoint=receiver.url))
        assert receiver.resource["service.name"] == "other"
        assert receiver.resource["deployment.environment.name"] == "test"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_receiver_that_is_away_costs_one_line_in_the_log(
    protocol: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    endpoint = f"http://127.0.0.1:{free_port()}"
    caplog.set_level(logging.INFO)
    async with traced(exporting(endpoint=endpoint, protocol=protocol)) as tracing:
        orchestrator = Orchestrator(embedded_team(), await engines(), tracing.on_event)
        for number in range(3):
            assert (await orchestrator.run(Job(str(number), "12+7"))).answer == "19"
            await asyncio.sleep(1.2)  # each job's spans are a batch of their own, whose export fails
    [line] = [record.getMessage() for record in caplog.records if "asyncio" not in record.name]
    assert line.startswith(f"traces: {endpoint} takes no spans")
    assert "traces.endpoint" in line


async def test_receiver_that_is_away_delays_no_job_and_little_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 1.0)
    began_s = time.monotonic()
    async with traced(exporting(endpoint=f"http://127.0.0.1:{free_port()}")) as tracing:
        orchestrator = Orchestrator(embedded_team(), await engines(), tracing.on_event)
        for number in range(20):
            await orchestrator.run(Job(str(number), "12+7"))
        worked_s = time.monotonic() - began_s
    assert worked_s < EXPORT_TIMEOUT_S
    assert time.monotonic() - began_s - worked_s < EXPORT_TIMEOUT_S


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_receiver_that_hangs_delays_no_job_and_the_end_by_a_bound(
    protocol: str, silent_port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 1.0)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    async with traced(exporting(endpoint=f"http://127.0.0.1:{silent_port}", protocol=protocol)) as tracing:
        orchestrator = Orchestrator(embedded_team(), await engines(), tracing.on_event)
        async with asyncio.timeout(EXPORT_TIMEOUT_S):
            await orchestrator.run(Job("1", "12+7"))
            await asyncio.sleep(0.1)  # an export has begun, and hangs
            await orchestrator.run(Job("2", "12+7"))
        began_s = time.monotonic()
    assert 0.9 < time.monotonic() - began_s < EXPORT_TIMEOUT_S
    assert "the last spans could not be exported within 1 s and are lost" in caplog.text


async def test_receiver_that_comes_back_gets_spans_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    caplog.set_level(logging.INFO)
    port = free_port()
    async with traced(exporting(endpoint=f"http://127.0.0.1:{port}")) as tracing:
        orchestrator = Orchestrator(embedded_team(), await engines(), tracing.on_event)
        await orchestrator.run(Job("1", "12+7"))
        async with asyncio.timeout(60):
            while "takes no spans" not in caplog.text:  # noqa: ASYNC110  the log has no event
                await asyncio.sleep(0.05)
        with grpc_receiver(port) as receiver:
            async with asyncio.timeout(60):
                while "takes spans again; " not in caplog.text:
                    await orchestrator.run(Job("2", "12+7"))
                    await asyncio.sleep(0.2)
            assert receiver.spans


async def test_full_queue_drops_spans_and_logs_it_once(
    silent_port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    await work(exporting(endpoint=f"http://127.0.0.1:{silent_port}"), jobs=10)
    assert caplog.text.count("Queue full") == 1


async def test_lines_about_another_exporter_stay_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with grpc_receiver() as receiver:
        async with traced(exporting(endpoint=receiver.url)):
            logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").warning("vLLM's receiver is away")
    assert "vLLM's receiver is away" in caplog.text


async def test_loggers_of_the_sdk_log_again_afterwards() -> None:
    names = [export.QUEUE_LOGGER, "opentelemetry.exporter.otlp.proto.grpc.exporter"]
    before = [list(logging.getLogger(name).filters) for name in names]
    with grpc_receiver() as receiver:
        await work(exporting(endpoint=receiver.url))
    assert [logging.getLogger(name).filters for name in names] == before


def test_variable_that_opentelemetry_refuses_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match=r"team\.yaml: traces: OpenTelemetry refuses its settings: .*'soon'.*OTEL_"):
        SpanExport(Traces(endpoint="http://localhost:4317"), "team.yaml")


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    code = """
import asyncio, sys
from runtime import config
import runtime.api.serve, runtime.cli.solve
from runtime.tracing.traced import traced

async def main():
    async with traced(config.load("embedded")):
        print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
