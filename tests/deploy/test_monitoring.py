"""Prometheus and Grafana: every name that they use is in the output of a real service."""

import json
import re
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from runtime.api.http.metrics import Metrics
from runtime.control.controller import Counts
from runtime.control.snapshot import DeviceView
from tests.deploy.files import ALERTS, DASHBOARD, DEPLOY, PROMETHEUS, loaded, mounts, needs_program, services
from tests.deploy.queries import Samples, faults
from tests.runtime.api.http.conftest import PROBLEM, configured, service, user_message
from tests.runtime.control.builders import snapshot, view

PANELS: list[dict[str, Any]] = [panel for panel in loaded(DASHBOARD)["panels"] if panel["type"] != "row"]
RULES: list[dict[str, Any]] = [rule for group in loaded(ALERTS)["groups"] for rule in group["rules"]]
[SCRAPE] = loaded(PROMETHEUS)["scrape_configs"]


def title(value: dict[str, Any]) -> str:
    return str(value.get("title") or value.get("alert"))


@pytest.fixture
async def samples(tmp_path: Path) -> Samples:
    """The samples of a service that has worked a job and a request, and those that only a GPU has."""
    async with service(configured(tmp_path)) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
        await served.client.get(f"/jobs/{job}/result", params={"wait_s": 60})
        await served.client.post("/v1/chat/completions", json={"model": "solver", "messages": user_message("x")})
        text = (await served.client.get("/metrics")).text
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in (*text_string_to_metric_families(text), *text_string_to_metric_families(of_gpu())):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
            found[sample.name].update()
    found["up"] = defaultdict(set, {"job": {SCRAPE["job_name"]}, "instance": set()})  # Prometheus makes this one
    return found


def of_gpu() -> str:
    """Return the metrics of an engine on a GPU whose telemetry reports everything."""
    seen = snapshot(view("a", utilization=0.4))
    device = DeviceView("gpu", total_bytes=1000, used_bytes=500, utilization=0.7)
    metrics = Metrics()
    metrics.controllers = SimpleNamespace(  # type: ignore[assignment]  # all that metrics read of controllers
        snapshots={"0": replace(seen, device=device)}, counts=Counts()
    )
    return metrics.text({}, {}).decode()


async def test_every_query_names_what_the_service_reports(samples: Samples) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            assert not list(faults(target["expr"], samples, target["legendFormat"])), title(panel)
    for rule in RULES:
        text = " ".join(rule["annotations"].values())
        assert not list(faults(rule["expr"], samples, text)), title(rule)


@pytest.mark.parametrize(
    ("query", "legend", "fault"),
    [
        ("troupe:engine_upp", "", "no metric 'troupe:engine_upp'"),
        ("rate(troupe:moved_bytes[5m])", "", "no metric 'troupe:moved_bytes'"),
        ("sum by (model) (troupe:engine_up)", "", "troupe:engine_up has no label 'model'"),
        (
            "sum by (le, engine) (rate(troupe:job_seconds_bucket[5m]))",
            "",
            "troupe:job_seconds_bucket has no label 'engine'",
        ),
        ('troupe:jobs{status="done"}', "", "troupe:jobs has no status='done'"),
        ('troupe:jobs{state=~"queued|runing"}', "", "troupe:jobs has no state='runing'"),
        ("troupe:engine_up", "{{engine}}", "troupe:engine_up has no label 'engine'"),
        ("troupe:engine_up", "The engine {{ $labels.engine }}", "troupe:engine_up has no label 'engine'"),
        ("1 + 1", "", "no metric in '1 + 1'"),
    ],
)
def test_a_wrong_name_is_found(query: str, legend: str, fault: str) -> None:
    samples = {
        "up": {"job": {"troupe"}},
        "troupe:engine_up": {"model_name": {"solver"}},
        "troupe:jobs": {"state": {"queued", "running", "done"}},
        "troupe:job_seconds_bucket": {"le": {"1.0", "+Inf"}},
        "troupe:moved_bytes_total": {},
    }
    assert list(faults(query, samples, legend)) == [fault]


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_panel_has_title_description_and_unit(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    named = "mappings" in defaults  # the values are words
    assert named or defaults["unit"] not in ("", "none", "short")
    assert panel["type"] != "timeseries" or defaults["custom"]["axisLabel"]


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in loaded(DASHBOARD)["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    ids = [panel["id"] for panel in loaded(DASHBOARD)["panels"]]
    assert len(ids) == len(set(ids))


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    [source] = loaded(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == loaded(PROMETHEUS)["global"]["scrape_interval"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    [provider] = loaded(DEPLOY / "grafana/provisioning/dashboards/troupe.yaml")["providers"]
    assert mounts(services("cpu")["grafana"])[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounts(services("cpu")["grafana"])["/etc/grafana/provisioning"] == "./grafana/provisioning"


def test_prometheus_scrapes_the_service_with_the_token_that_compose_gives_it() -> None:
    compose = services("cpu")
    [target] = SCRAPE["static_configs"][0]["targets"]
    assert target == "troupe:8000"
    assert SCRAPE.get("metrics_path", "/metrics") == "/metrics"
    credentials = Path(SCRAPE["authorization"]["credentials_file"])
    assert credentials.parent == Path("/run/secrets")
    assert credentials.name in compose["prometheus"]["secrets"]
    assert mounts(compose["prometheus"])["/etc/prometheus"] == "./prometheus"
    assert f"--config.file=/etc/prometheus/{PROMETHEUS.name}" in compose["prometheus"]["command"]
    assert all((PROMETHEUS.parent / name).is_file() for name in loaded(PROMETHEUS)["rule_files"])


@pytest.mark.parametrize("rule", RULES, ids=title)
def test_alert_says_what_is_wrong_and_what_it_means(rule: dict[str, Any]) -> None:
    assert all(rule["annotations"][key].endswith(".") for key in ("summary", "description"))


@needs_program("promtool")
def test_promtool_accepts_configuration_alerts_and_queries(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions)
    ]
    queries = tmp_path / "queries.yml"
    queries.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    for command in (
        ("config", "--syntax-only", str(PROMETHEUS)),  # without it, promtool wants the file of the token
        ("rules", str(ALERTS), str(queries)),
    ):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_has_lines_of_at_most_120_characters() -> None:
    assert max(map(len, DASHBOARD.read_text().splitlines())) <= 120
    assert not re.search(r"\$\{|DS_PROMETHEUS", json.dumps(loaded(DASHBOARD)))  # left by an export, and unset here
