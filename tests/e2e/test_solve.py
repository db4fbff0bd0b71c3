"""The command with real vLLM engines and the shipped weights: right answers, kept results, nothing left behind."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SAMPLE, Command, results

pytestmark = pytest.mark.e2e

STEP_KEYS = {"role", "input", "output", "verdict", "round"}


def test_the_embedded_team_solves_the_sample_problems(troupe: Command) -> None:
    done = troupe.run("solve", "--file", SAMPLE, "--out", "r.jsonl")
    assert done.returncode == 0, done.stderr
    found = results(troupe.folder / "r.jsonl")
    assert len(found) == len(SAMPLE.read_text().splitlines())
    assert all(r["correct"] and r["confirmed"] for r in found.values()), found
    for result in found.values():
        assert {step["role"] for step in result["steps"]} == {"planner", "solver", "critic"}
        assert all(set(step) == STEP_KEYS for step in result["steps"])
        assert all(used["prompt_tokens"] and used["completion_tokens"] for used in result["usage"].values())
        assert 0 < result["elapsed_s"] < 60
    assert "100.0% right" in done.stderr
    assert "vllm" not in (done.stdout + done.stderr).lower()  # its logging is in files
    assert list((troupe.folder / "home" / "runs").glob("*/engine-solver.log"))
    assert [path for path in troupe.temporary.iterdir() if not path.name.startswith("torchinductor")] == []
    troupe.nothing_left()


def test_one_problem_prints_steps_verdicts_and_answer(troupe: Command) -> None:
    done = troupe.run("solve", "(12+7)*3", "--watch")
    assert done.returncode == 0, done.stderr
    watched = " ".join(done.stderr.split())  # whatever its width, and how it breaks lines
    assert "gpu_memory_utilization" in watched
    assert re.search(r"solver solver ready \d+\.\d%", watched)  # the controller has moved what it began with
    assert done.stdout.splitlines()[-1] == "answer: 57"
    assert "A=12+7; B=A*3" in done.stdout
    assert done.stdout.count("accepted") == 2
    troupe.nothing_left()


def test_one_problem_as_json_is_one_object(troupe: Command) -> None:
    done = troupe.run("solve", "12-45*3", "--json", "--workflow", "vote", "--temperature", "1", "--seed", "3")
    result = json.loads(done.stdout)
    assert (result["answer"], result["id"], done.returncode) == ("-123", "1", 0)
    assert sum(step["role"] == "solver" for step in result["steps"]) == 6


def test_faulty_lines_cost_no_other_its_result(troupe: Command) -> None:
    lines = ['{"id": "good", "problem": "1+2"}', "rubbish", '{"id": "big", "problem": "5000+1"}']
    (troupe.folder / "p.jsonl").write_text("\n".join(lines))
    done = troupe.run("solve", "--file", "p.jsonl", "--json")
    *found, summary = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert {r["id"]: r.get("answer") for r in found} == {"good": "3", "line-2": None, "big": None}
    assert "line 2: not JSON" in done.stderr
    assert "operand 5000" in done.stderr
    assert summary["summary"]["failed"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["solve"], "give one PROBLEM or --file"),
        (["solve", ""], "the problem is empty"),
        (["solve", "1000+1"], "operand 1000"),
        (["solve", "1 + \N{SNOWMAN}"], "'\N{SNOWMAN}'"),
        (["solve", "1+2", "--workflow", "debate"], "deliberate"),
        (["solve", "1+2", "--config", "nowhere.yaml"], "embedded"),
        (["solve", "1+2", "--temperature", "9"], "--temperature"),
        (["solve", "1+2", "--out", "r.jsonl"], "--out goes with --file"),
        (["solve", "--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["solve", "1+2", "--resume"], "--resume"),
        (["slove", "1+2"], "slove"),
    ],
)
def test_bad_usage_is_told_before_any_engine_starts(arguments: list[str], told: str, troupe: Command) -> None:
    done = troupe.run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (troupe.folder / "home").exists()


def held_out(folder: Path, count: int) -> Path:
    path = folder / "p.jsonl"
    lines = SAMPLE.with_name("held-out.jsonl").read_text().splitlines(keepends=True)[:count]
    path.write_text("".join(lines))
    return path


def started(troupe: Command, out: Path, count: int = 200, concurrency: int = 1) -> subprocess.Popen[str]:
    """A run over many problems that has written its first results."""
    asked = held_out(troupe.folder, count)
    process = troupe.start("solve", "--file", asked, "--out", out, "--concurrency", concurrency)
    troupe.wait_until(lambda: out.exists() and out.read_text().count("\n") >= 2)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_is_done_and_resumes(number: int, code: int, troupe: Command) -> None:
    out = troupe.folder / "r.jsonl"
    with started(troupe, out) as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    troupe.nothing_left()
    kept = results(out)
    assert 2 <= len(kept) < 200
    again = troupe.run("solve", "--file", troupe.folder / "p.jsonl", "--out", out)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    resumed = troupe.run("solve", "--file", troupe.folder / "p.jsonl", "--out", out, "--resume")
    assert f"{len(kept)} problems are done, {200 - len(kept)} to go" in resumed.stderr
    whole = results(out)
    assert len(whole) == len(out.read_text().splitlines()) == 200
    assert all(whole[identity] == kept[identity] for identity in kept)


def test_a_second_ctrl_c_ends_it_at_once(troupe: Command) -> None:
    with started(troupe, troupe.folder / "r.jsonl") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    troupe.nothing_left()


def test_the_terminals_ctrl_c_reaches_the_parent_alone(troupe: Command) -> None:
    out = troupe.folder / "r.jsonl"
    with started(troupe, out) as process:
        group = [p for p in troupe.processes() if p.pid != process.pid and _group(p.pid) == process.pid]
        assert not [p for p in group if "forkserver" in " ".join(p.cmdline()) or p in troupe.engines()]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    troupe.nothing_left()


def _group(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[2])


@pytest.mark.parametrize("moment", ["starting", "solving"])
def test_nothing_outlives_a_parent_that_was_killed(moment: str, troupe: Command) -> None:
    if moment == "solving":
        process = started(troupe, troupe.folder / "r.jsonl")
    else:
        process = troupe.start("solve", "1+2")
        troupe.wait_until(lambda: len(troupe.processes()) > 1)
        time.sleep(1)  # somewhere in the imports
    process.kill()
    process.communicate()
    troupe.nothing_left()


def test_killed_engines_come_back_and_every_problem_is_solved_once(troupe: Command) -> None:
    out = troupe.folder / "r.jsonl"
    process = started(troupe, out, count=100, concurrency=4)
    victims = troupe.engines()
    assert len(victims) == 3
    for victim in victims:
        victim.kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert len(out.read_text().splitlines()) == 100
    found = results(out)
    assert len(found) == 100
    assert sum(result["correct"] for result in found.values()) >= 98
    troupe.nothing_left()


def test_an_engine_that_cannot_start_is_told_with_its_log(troupe: Command) -> None:
    model = troupe.folder / "model"
    model.mkdir()
    for file in (SAMPLE.parents[1] / "models" / "solver").iterdir():
        content = file.read_bytes()
        (model / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    (troupe.folder / "team.yaml").write_text("extends: embedded\nengines: {solver: {model: ./model}}\n")
    done = troupe.run("solve", "1+2", "--config", "team.yaml")
    assert done.returncode == 2
    assert "engine solver did not start" in done.stderr
    assert "engine-solver.log" in done.stderr
    assert "Traceback" not in done.stderr
    troupe.nothing_left()
