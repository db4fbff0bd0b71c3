"""The OpenAPI document: schemathesis gets only the responses that it documents, and never a server error."""

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
ENDLESS_STREAMS = "^/(events|live)$"
"""test_jobs.py and test_live.py check these."""
VLLM_BODIES = "^/(v1/(chat/completions|completions|responses|messages.*)|tokenize|detokenize)$"
"""Routes whose bodies vLLM's classes describe and check. They have too many keys for a test of every value of each."""


@pytest.mark.parametrize(
    "selection",
    [
        [f"--exclude-path-regex={ENDLESS_STREAMS}|{VLLM_BODIES}"],
        [f"--include-path-regex={VLLM_BODIES}", "--phases=fuzzing", "--exclude-checks=negative_data_rejection"],
    ],
    ids=["ours", "vllm"],
)
async def test_responses_conform_to_the_openapi_document(tmp_path: Path, selection: list[str]) -> None:
    async with service(configured(tmp_path)) as served:
        await served.client.get("/openapi.json", timeout=600)  # imports vLLM; schemathesis waits for 10 s at most
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{served.url}/openapi.json",
            *selection,
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


async def test_document_has_every_route_with_its_errors(served: Served) -> None:
    document = (await served.client.get("/openapi.json", timeout=600)).json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            if path not in ("/health", "/ready"):
                assert {"400", "401", "403", "503"} <= set(operation["responses"]), (path, method)
    assert "HTTPValidationError" not in json.dumps(document)
    for path in ("/jobs", "/jobs/{id}/events", "/v1/chat/completions", "/control/pins/{engine}", "/metrics"):
        assert path in document["paths"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_documentation_pages_that_load_from_other_sites_are_disabled(served: Served, path: str) -> None:
    assert (await served.client.get(path)).status_code == 404
