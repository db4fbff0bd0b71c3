"""The OpenAPI document is true: what schemathesis makes of it is answered as it says, and never by a 5xx."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.runtime.api.http.conftest import Served, configured, service

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)
ENDLESS = "^/(events|live)$"
"""Streams that go on for ever; tests of their own hold them against what they say."""


async def test_every_answer_is_one_that_the_document_says(tmp_path: Path) -> None:
    async with service(configured(tmp_path)) as served:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{served.url}/openapi.json",
            f"--exclude-path-regex={ENDLESS}",
            f"--checks={','.join(CHECKS)}",
            "--max-examples=10",
            "--request-timeout=60",
            "--seed=1",
            "--no-color",
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


async def test_every_route_is_in_the_document_and_has_its_errors(served: Served) -> None:
    document = (await served.client.get("/openapi.json")).json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            if path not in ("/health", "/ready"):
                assert {"400", "401", "403", "503"} <= set(operation["responses"]), (path, method)
    assert "HTTPValidationError" not in json.dumps(document)
    for path in ("/jobs", "/jobs/{id}/events", "/v1/chat/completions", "/control/pins/{engine}", "/metrics"):
        assert path in document["paths"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_no_page_that_loads_from_elsewhere(served: Served, path: str) -> None:
    assert (await served.client.get(path)).status_code == 404
