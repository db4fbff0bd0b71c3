"""`troupe solve` with real vLLM engines and the shipped weights: answers, kept results, and no process left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.cli.main import main
from tests.e2e.conftest import LONG_S, SAMPLE, Command, results, wait_until

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
        assert 0 < result["elapsed_s"] < LONG_S
    assert "100.0% right" in done.stderr
    assert "vllm" not in (done.stdout + done.stderr).lower()  # vLLM logs to files only
    assert list((troupe.folder / "home" / "runs").glob("*/engine-solver.log"))
    assert [path for path in troupe.temporary.iterdir() if not path.name.startswith("torchinductor")] == []
    troupe.nothing_left()


def test_one_problem_prints_its_steps_verdicts_and_answer(troupe: Command) -> None:
    done = troupe.run("solve", "(12+7)*3", "--watch")
    assert done.returncode == 0, done.stderr
    watched = " ".join(done.stderr.split())  # the table's width and line breaks do not matter
    assert "gpu_memory_utilization" in watched
    assert re.search(r"solver solver ready \d+\.\d%", watched)  # the controller has changed the first share
    assert done.stdout.splitlines()[-1] == "answer: 57"
    assert "A=12+7; B=A*3" in done.stdout
    assert done.stdout.count("accepted") == 2
    troupe.nothing_left()


def test_faulty_lines_fail_alone(troupe: Command) -> None:
    lines = ['{"id": "good", "problem": "12-45*3"}', "rubbish", '{"id": "big", "problem": "5000+1"}']
    (troupe.folder / "p.jsonl").write_text("\n".join(lines))
    options = ("--json", "--workflow", "vote", "--temperature", 1, "--seed", 3)
    done = troupe.run("solve", "--file", "p.jsonl", *options)
    *found, summary = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert {r["id"]: r.get("answer") for r in found} == {"good": "-123", "line-2": None, "big": None}
    [good] = [r for r in found if r["id"] == "good"]
    assert sum(step["role"] == "solver" for step in good["steps"]) == 6  # two steps, three votes each
    assert "line 2: not JSON" in done.stderr
    assert "operand 5000" in done.stderr
    assert summary["summary"]["failed"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve"], "give one PROBLEM or --file"),
        (["solve", ""], "the problem is empty"),
        (["solve", "1000+1"], "operand 1000"),
        (["solve", "1 + \N{SNOWMAN}"], "'\N{SNOWMAN}'"),
        (["solve", "1+2", "--workflow", "delibrate"], "deliberate"),
        (["solve", "1+2", "--config", "nowhere.yaml"], "embedded"),
        (["solve", "1+2", "--temperature", "9"], "--temperature"),
        (["solve", "1+2", "--out", "r.jsonl"], "--out needs --file"),
        (["solve", "1+2", "--compare", "exact"], "--compare needs --file"),
        (["solve", "--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["solve", "1+2", "--resume"], "--resume"),
        (["slove", "1+2"], "slove"),
    ],
)
def test_wrong_usage_is_reported_before_any_engine_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["troupe", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    stderr = capsys.readouterr().err
    assert exited.value.code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "home").exists()


def start_long_run(troupe: Command, out: Path, *options: object, count: int = 80) -> subprocess.Popen[str]:
    """Start a run over many problems, and return once it has added two results to `out`."""
    lines = SAMPLE.with_name("held-out.jsonl").read_text().splitlines(keepends=True)[:count]
    problems = troupe.folder / "p.jsonl"
    problems.write_text("".join(lines))
    before = len(out.read_text().splitlines()) if out.exists() else 0
    process = troupe.start("solve", "--file", problems, "--out", out, *options)
    wait_until(
        lambda: process.poll() is not None or (out.exists() and out.read_text().count("\n") >= before + 2),
    )
    assert process.poll() is None, process.communicate()
    return process


def ctrl_c(troupe: Command, process: subprocess.Popen[str]) -> None:
    """Send SIGINT to the command. Check first that a terminal, which signals the whole group, would reach no engine."""
    group = [p for p in troupe.processes() if p.pid != process.pid and os.getpgid(p.pid) == process.pid]
    assert not [p for p in group if "forkserver" in " ".join(p.cmdline()) or p in troupe.engines()]
    process.send_signal(signal.SIGINT)


def sigterm_twice(troupe: Command, process: subprocess.Popen[str]) -> None:
    """Send SIGTERM, and send it again while the engines close."""
    process.terminate()
    assert process.stderr is not None
    while "again to end at once" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()


def sigkill(troupe: Command, process: subprocess.Popen[str]) -> None:
    process.kill()


def test_an_interrupted_run_keeps_its_results_and_resumes(troupe: Command) -> None:
    """Interrupt a run three times. Each way leaves it less time to clean up than the one before."""
    out = troupe.folder / "r.jsonl"
    kept: dict[str, Any] = {}
    for interrupt, code in ((ctrl_c, 130), (sigterm_twice, 143), (sigkill, -signal.SIGKILL)):
        with start_long_run(troupe, out, "--concurrency", 1, *(["--resume"] if kept else [])) as process:
            interrupt(troupe, process)
            _, err = process.communicate(timeout=LONG_S)
        assert process.returncode == code, err
        assert "Traceback" not in err
        troupe.nothing_left()
        before, kept = kept, results(out)
        assert len(before) + 2 <= len(kept) < 80
        assert before.items() <= kept.items()
    again = troupe.run("solve", "--file", troupe.folder / "p.jsonl", "--out", out)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    resumed = troupe.run("solve", "--file", troupe.folder / "p.jsonl", "--out", out, "--resume")
    assert f"{len(kept)} problems are done, {80 - len(kept)} to go" in resumed.stderr
    whole = results(out)
    assert len(whole) == len(out.read_text().splitlines()) == 80
    assert kept.items() <= whole.items()


def test_no_process_outlives_a_command_that_is_killed_while_it_starts(troupe: Command) -> None:
    process = troupe.start("solve", "1+2")
    wait_until(lambda: len(troupe.processes()) > 1)
    time.sleep(1)  # it is now importing its modules
    process.kill()
    process.communicate()
    troupe.nothing_left()


def test_killed_engines_restart_and_every_problem_is_solved_once(troupe: Command) -> None:
    out = troupe.folder / "r.jsonl"
    process = start_long_run(troupe, out, "--concurrency", 4, count=100)
    victims = troupe.engines()
    assert len(victims) == 3
    for victim in victims:
        victim.kill()
    _, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, err
    assert len(out.read_text().splitlines()) == 100
    found = results(out)
    assert len(found) == 100
    assert sum(result["correct"] for result in found.values()) >= 98
    troupe.nothing_left()


def test_an_engine_that_cannot_start_is_reported_with_its_log(troupe: Command) -> None:
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
