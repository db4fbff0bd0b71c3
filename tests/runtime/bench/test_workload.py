"""A workload draws the same arrivals from the same seed, at its rate and burstiness. Errors name the key or line."""

import json
import statistics
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.bench import workload
from runtime.bench.workload import FOLDER, Source
from runtime.errors import ConfigError, InputError

PHASE: dict[str, Any] = {"name": "one", "seconds": 100, "jobs_per_s": 20}


def write(folder: Path, **keys: Any) -> Path:
    (folder / "problems.jsonl").write_text('{"problem": "1+2", "answer": 3}\n{"problem": "12+34+56", "answer": 102}\n')
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"problems": "problems.jsonl", "phases": [PHASE], **keys}))
    return path


def read(folder: Path, **keys: Any) -> Source:
    return workload.load(str(write(folder, **keys)))


def gaps(source: Source, load: float = 1) -> list[float]:
    times = [arrival.at_s for arrival in source.draw(load, 0).arrivals]
    return [later - earlier for earlier, later in pairwise(times)]


def test_arrival_rate_is_rate_times_load(tmp_path: Path) -> None:
    source = read(tmp_path)
    assert len(source.draw(1, 0).arrivals) == pytest.approx(2000, rel=0.1)
    assert len(source.draw(0.5, 0).arrivals) == pytest.approx(1000, rel=0.1)
    assert all(0 <= arrival.at_s < 100 for arrival in source.draw(1, 0).arrivals)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_gamma_distribution(tmp_path: Path, burstiness: float, variation: float) -> None:
    drawn = gaps(read(tmp_path, phases=[{**PHASE, "burstiness": burstiness}]))
    assert statistics.stdev(drawn) / statistics.fmean(drawn) == pytest.approx(variation, rel=0.15)


def test_at_rate_multiplies_the_rates(tmp_path: Path) -> None:
    closed = {"name": "c", "seconds": 3, "concurrency": 8}
    source = read(tmp_path, phases=[PHASE, closed]).at_rate(0.25)
    assert [phase.jobs_per_s for phase in source.workload.phases] == [5, None]
    assert len(source.draw(1, 0).arrivals) == pytest.approx(500, rel=0.15)


def test_draw_depends_on_the_seed(tmp_path: Path) -> None:
    source = read(tmp_path)
    assert source.draw(1, 3) == source.draw(1, 3)
    assert source.draw(1, 3) != source.draw(1, 4)


def test_phases_run_in_order_in_each_cycle(tmp_path: Path) -> None:
    two = [{**PHASE, "seconds": 10}, {**PHASE, "name": "two", "seconds": 5, "characters": [6, 20]}]
    script = read(tmp_path, phases=two, cycles=2).draw(1, 0)
    assert [phase for phase, _ in groupby(arrival.phase for arrival in script.arrivals)] == ["one", "two", "one", "two"]
    assert {arrival.problem.problem for arrival in script.arrivals if arrival.phase == "two"} == {"12+34+56"}
    assert {arrival.phase for arrival in script.arrivals if 10 < arrival.at_s < 15} == {"two"}


def test_closed_loop_concurrency_scales_with_the_load(tmp_path: Path) -> None:
    [closed] = read(tmp_path, phases=[{"name": "c", "seconds": 3, "concurrency": 8}]).draw(2, 0).closed
    assert (closed.concurrency, closed.seconds, len(closed.problems)) == (16, 3, 2)


def test_trace_arrivals_scale_with_the_load(tmp_path: Path) -> None:
    lines = [{"at_s": 4, "problem": "1+1", "answer": 2, "compare": "exact"}, {"at_s": 1.5, "problem": "2+2"}]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = read(tmp_path, phases=[], trace="trace.jsonl")
    assert [arrival.at_s for arrival in source.draw(2, 0).arrivals] == [0.75, 2]
    late = source.draw(1, 0).arrivals[1].problem
    assert (late.expected, late.compare) == ("2", "exact")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"at_s": -1, "problem": "1+1"}', "line 2: at_s: give the seconds from the start, at least 0, not -1"),
        ('{"at_s": "now", "problem": "1+1"}', "line 2: at_s"),
        ('{"at_s": 1}', "line 2: problem: give a text, not None"),
        ('{"at_s": 1, "problem": "1+1", "when": 2}', "line 2: unknown key 'when'"),
        ('{"at_s": 1, "problem": "1+1", "answer": [2]}', 'line 2: "answer" is neither text nor a number'),
        ('{"at_s": 1, "problem": "1+1", "compare": "exact"}', 'line 2: "compare" is exact, but there is no expected'),
    ],
)
def test_wrong_trace_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_text(f'{{"at_s": 1, "problem": "1+1"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        read(tmp_path, phases=[], trace="trace.jsonl")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"phases": [{**PHASE, "seconds": 0}]}, "phases.0.seconds"),
        (
            {"phases": [{**PHASE, "second": 1}]},
            r"phases.0.second: unknown key; did you mean seconds\? known: name, seconds",
        ),
        ({"phases": [{"name": "x", "seconds": 1}]}, r"phases.0: give jobs_per_s \(open loop\) or concurrency"),
        ({"phases": [PHASE, PHASE]}, "two phases have the same name"),
        ({"phases": []}, "give either phases or a trace"),
        ({"loads": [0]}, "loads: every load must be above 0"),
        ({"slo": {"jct": 1}}, r"slo.jct: unknown key; did you mean jct_s\? known: jct_s, ttft_s, tpot_s"),
        (
            {"lengths": {"a": {"prompt": [9, 2], "reply": [1, 2]}}},
            "lengths.a.prompt: give the shortest and",
        ),
        (
            {"lengths": {"a": {"prompt": [0, 2], "reply": [1, 2]}}},
            "lengths.a.prompt: give the shortest and",
        ),
        ({"lengths": {"a": {"prompt": [1, 2]}}}, "lengths.a.reply: this key is required"),
        (
            {"lengths": {"a": {"prompts": [1, 2]}}},
            r"lengths.a.prompts: unknown key; did you mean prompt\? known: prompt, reply",
        ),
        ({"phases": [{**PHASE, "characters": [50, 60]}]}, "phases.one.characters: no problem has 50 to 60 characters"),
    ],
)
def test_wrong_key_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **keys)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no shipped workload 'nothing'; known: .*phases"):
        workload.load("nothing")
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path, problems="none.jsonl")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_workloads_load(path: Path) -> None:
    source = workload.load(path.stem)
    script = source.draw(1, 0)
    assert script.arrivals or script.closed
