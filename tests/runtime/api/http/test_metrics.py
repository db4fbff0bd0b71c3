"""Metrics in Prometheus' format."""

from prometheus_client.parser import text_string_to_metric_families

from tests.runtime.api.http.conftest import PROBLEM, Served, user_message


async def test_metrics_count_jobs_requests_and_tokens(served: Served) -> None:
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})
    body = {"model": "solver", "messages": user_message("x")}
    await served.client.post("/v1/chat/completions", json=body)
    response = await served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert values["troupe:jobs", "done"] == 1
    assert values["vllm:generation_tokens_total", "solver"] > 0
    assert values["vllm:time_to_first_token_seconds_count", "solver"] == 5  # four calls of the job, and one chat
    assert values["vllm:num_requests_running", "planner"] == 0
    assert values["troupe:engine_up", "critic"] == 1
