"""Metrics in Prometheus' format."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from runtime.api.http.metrics import Metrics
from runtime.control.controller import Counts
from runtime.control.snapshot import DeviceView
from runtime.jobs.journal.transaction import Transaction
from tests.runtime.api.http.conftest import PROBLEM, Served, Start, pause_solver, user_message
from tests.runtime.control.builders import snapshot, view


async def test_metrics_count_jobs_requests_and_tokens(served: Served) -> None:
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})
    body = {"model": "solver", "messages": user_message("x")}
    await served.client.post("/v1/chat/completions", json=body)
    response = await served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = samples(response.text)
    assert values["troupe:jobs", "done"] == 1
    assert (values["troupe:jobs_ended_total", "done"], values["troupe:jobs_ended_total", "failed"]) == (1, 0)
    assert values["troupe:job_seconds_count",] == 1
    assert values["vllm:generation_tokens_total", "solver"] > 0
    assert values["vllm:time_to_first_token_seconds_count", "solver"] == 5  # four calls of the job, and one chat
    assert values["vllm:num_requests_running", "planner"] == 0
    assert values["troupe:engine_up", "critic"] == 1


async def test_metrics_have_pauses_costs_and_lanes(start: Start) -> None:
    served = await start(time_scale=1)
    await pause_solver(served)
    values = samples((await served.client.get("/metrics")).text)
    assert values["troupe:max_active_seqs", "solver"] == 0
    assert values["troupe:admission_paused_seconds", "solver"] >= 0.1
    assert values["troupe:admission_paused_seconds", "planner"] == 0
    assert values["troupe:step_seconds", "solver"] > 0
    assert values["troupe:step_seconds_per_sequence", "solver"] >= 0
    assert values["troupe:step_seconds_per_prompt_token", "solver"] >= 0
    assert 0 < values["troupe:step_seconds_confidence", "solver"] < 1
    assert values["troupe:lanes", "0"] >= 1
    assert 0 <= values["troupe:lanes_confidence", "0"] <= 1
    assert ("troupe:engine_utilization", "solver") not in values  # modelled engines have no process


def test_metrics_have_the_utilization_that_nvml_reports() -> None:
    seen = snapshot(view("a", utilization=0.4), view("b"))
    metrics = Metrics()
    metrics.controllers = SimpleNamespace(  # type: ignore[assignment]  # all that metrics read of controllers
        snapshots={"0": replace(seen, device=DeviceView("gpu", utilization=0.7))}, counts=Counts()
    )
    values = samples(metrics.text({}, {}).decode())
    assert (values["troupe:engine_utilization", "a"], values["troupe:device_utilization", "0"]) == (0.4, 0.7)
    assert ("troupe:engine_utilization", "b") not in values


def test_metrics_have_the_memory_of_the_device_if_telemetry_reports_it() -> None:
    metrics = Metrics()
    controllers = SimpleNamespace(snapshots={"0": snapshot(view("a"))}, counts=Counts())
    metrics.controllers = controllers  # type: ignore[assignment]  # as above
    assert ("troupe:device_memory_bytes", "0") not in samples(metrics.text({}, {}).decode())
    device = DeviceView("gpu", total_bytes=1000, used_bytes=0)
    controllers.snapshots["0"] = replace(controllers.snapshots["0"], device=device)
    values = samples(metrics.text({}, {}).decode())
    assert (values["troupe:device_memory_bytes", "0"], values["troupe:device_memory_used_bytes", "0"]) == (1000, 0)


async def test_jobs_ended_counts_jobs_that_the_journal_no_longer_holds(start: Start) -> None:
    served = await start(keep_jobs=0)
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})
    await served.backend.jobs.journal.write(partial(Transaction.delete_ended, ended_before=0, keep=0))
    values = samples((await served.client.get("/metrics")).text)
    assert (values["troupe:jobs", "done"], values["troupe:jobs_ended_total", "done"]) == (0, 1)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the values of metrics by their name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
