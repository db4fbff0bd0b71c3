"""The traces of a service's jobs, over fake engines and a real journal, through retries and restarts."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from runtime import config
from runtime.config import Config, Service, Traces
from runtime.engines.handle import EngineHandle
from runtime.events import fan_out
from runtime.jobs.job import JobState
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.service import JobService
from runtime.jobs.submission import Submission
from runtime.tracing import export
from runtime.tracing.traced import traced
from tests.runtime.api.http.conftest import configured
from tests.runtime.api.http.conftest import service as http_service
from tests.runtime.fakes import embedded_team, engines
from tests.runtime.jobs.test_service import PROBLEM, STEPS, Counting, wait_for_end, wait_until
from tests.runtime.tracing.receiver import Receiver, grpc_receiver, values

ROOT = "invoke_workflow deliberate"


@asynccontextmanager
async def service(
    folder: Path, receiver: Receiver, handles: Mapping[str, EngineHandle] | None = None, settings: Service | None = None
) -> AsyncIterator[JobService]:
    """Run a service whose jobs are traced. Its engines never start if `handles` is empty."""
    team = embedded_team()
    async with (
        traced(traced_config(receiver), resumable=True) as tracing,
        JobService(folder / "jobs.db", team, settings) as jobs,
        tracing.following(jobs),
    ):
        if handles != {}:
            listener = fan_out(jobs.on_event, tracing.on_event)
            jobs.use(Orchestrator(team, handles or await engines(), listener))
        yield jobs


def traced_config(receiver: Receiver) -> Config:
    return config.load("embedded").model_copy(update={"traces": Traces(endpoint=receiver.url)})


async def test_trace_has_the_id_of_its_job(tmp_path: Path) -> None:
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver) as jobs:
            id = (await jobs.submit(PROBLEM))[0].id
            record = await wait_for_end(jobs, id)
        root = receiver.one(ROOT)
        assert {span.trace_id.hex() for span in receiver.spans} == {id}
        assert len(receiver.below(root)) == STEPS
        assert root.start_time_unix_nano == int(record.submitted_at * 1e9)
        assert record.ended_at is not None
        assert root.end_time_unix_nano == int(record.ended_at * 1e9)
        assert [event.name for event in root.events] == ["troupe.job.running"]
        assert values(root.attributes) | {"troupe.job.state": "done", "troupe.job.confirmed": True} == values(
            root.attributes
        )
        tokens = [values(span.attributes)["gen_ai.usage.output_tokens"] for span in receiver.below(root)]
        assert values(root.attributes)["gen_ai.usage.output_tokens"] == sum(tokens)


async def test_retry_adds_to_the_trace(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.failing_after, counting.failures = 3, 1
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver, handles) as jobs:
            record = await wait_for_end(jobs, (await jobs.submit(PROBLEM))[0].id)
            assert (record.state, record.attempts) == (JobState.DONE, 2)
        root = receiver.one(ROOT)
        assert values(root.attributes)["troupe.job.attempts"] == 2
        assert [event.name for event in root.events] == [
            "troupe.job.queued",
            "troupe.job.running",
            "troupe.job.queued",
            "troupe.job.running",
        ]
        assert values(root.events[2].attributes) == {"troupe.why": "the engine failed"}
        states = [values(span.attributes).get("error.type") for span in receiver.below(root)]
        assert states.count(None) == STEPS
        assert states.count("job_ended") >= 1


async def test_restart_continues_the_trace(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.hold_after = 4
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver, handles) as jobs:
            id = (await jobs.submit(PROBLEM))[0].id
            await wait_until(lambda: not counting.go.is_set())
        assert not receiver.named(ROOT)
        assert {span.trace_id.hex() for span in receiver.spans} == {id}
        async with service(tmp_path, receiver) as jobs:
            assert (await wait_for_end(jobs, id)).attempts == 2
        root = receiver.one(ROOT)
        assert {span.trace_id.hex() for span in receiver.spans} == {id}
        calls = receiver.below(root)
        assert len(receiver.spans) == 1 + 2 * len(calls)
        states = [values(span.attributes).get("error.type") for span in calls]
        assert states.count(None) == STEPS
        assert states.count("job_ended") == len(states) - STEPS >= 1  # the calls that the stop interrupted
        assert values(root.events[2].attributes) == {"troupe.why": "the runtime was started anew"}


async def test_job_that_never_ran_has_a_root_span(tmp_path: Path) -> None:
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver, {}) as jobs:
            cancelled = (await jobs.submit(PROBLEM))[0].id
            expired = (await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 0.01})))[0].id
            await jobs.cancel(cancelled)
            await wait_for_end(jobs, expired)
        states = {span.trace_id.hex(): values(span.attributes)["error.type"] for span in receiver.named(ROOT)}
        assert states == {cancelled: "cancelled", expired: "expired"}


async def test_failed_job_has_its_error(tmp_path: Path) -> None:
    handles = await engines()
    Counting(handles).failures = 100
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver, handles) as jobs:
            await wait_for_end(jobs, (await jobs.submit(PROBLEM.model_copy(update={"retries": 0})))[0].id)
        root = receiver.one(ROOT)
        assert (root.status.message, values(root.attributes)["error.type"]) == ("the engine failed", "failed")


async def test_many_jobs_have_a_root_each(tmp_path: Path) -> None:
    with grpc_receiver() as receiver:
        async with service(tmp_path, receiver, settings=Service(jobs_at_once=8)) as jobs:
            ids = [(await jobs.submit(Submission(problem=f"{n}+1")))[0].id for n in range(50)]
            for id in ids:
                await wait_for_end(jobs, id)
        assert sorted(span.trace_id.hex() for span in receiver.named(ROOT)) == sorted(ids)


async def test_served_job_is_traced_and_the_service_ends_while_the_receiver_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHUTDOWN_S", 0.5)
    with grpc_receiver() as receiver:
        chosen = configured(tmp_path).model_copy(update={"traces": Traces(endpoint=receiver.url)})
        async with http_service(chosen) as served:
            job = await submit(served.client)
        assert receiver.one(ROOT).trace_id.hex() == job
        receiver.answers.clear()
        async with http_service(chosen) as served:
            await submit(served.client)
        assert len(receiver.named(ROOT)) == 1


async def submit(client: httpx.AsyncClient) -> str:
    """Submit a job, and return its id once it is done."""
    job = str((await client.post("/jobs", json={"problem": "12+7"})).json()["id"])
    ended = (await client.get(f"/jobs/{job}/result", params={"wait_s": 60})).json()
    assert ended["state"] == "done"
    return job
