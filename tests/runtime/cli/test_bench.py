"""`troupe bench`: what `--emulate` takes and refuses. No engine starts here."""

from dataclasses import replace

import pytest

from runtime import config as configuration
from runtime.bench import workload
from runtime.bench.plan import Plan, parse_step_times
from runtime.engines.step_time import StepTime
from runtime.errors import InputError

EMBEDDED = configuration.load("embedded")


def test_emulate_gives_each_engine_its_step_time() -> None:
    times = parse_step_times("solver=20, critic=12+0.1,planner=8", EMBEDDED)
    assert times == {"solver": StepTime(20), "critic": StepTime(12, 0.1), "planner": StepTime(8)}
    assert times["critic"].seconds(30) == pytest.approx(0.015)
    assert parse_step_times(None, EMBEDDED) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no engine ''; known: planner, solver, critic"),
        ("planer=8", "there is no engine 'planer'; did you mean planner"),
        ("planner=8,planner=9", "give the engine planner once"),
        ("planner=8,critic=1", "give every engine a step time; these have none: solver"),
        *(
            (f"planner={value}", f"give planner milliseconds above 0 and at most 10000, .* not '{value}'")
            for value in ("", "fast", "0", "-1", "nan", "inf", "10001", r"8\+0", r"8\+1\+1", "8ms")
        ),
    ],
)
def test_emulate_refuses_a_wrong_value(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--emulate: {message}"):
        parse_step_times(text.replace("\\", ""), EMBEDDED)


def test_a_plan_says_that_its_device_is_emulated() -> None:
    plan = Plan(EMBEDDED, workload.load("phases"), [], (1.0,), 1, False, None)
    assert plan.emulation is None
    assert replace(plan, step_times={"solver": StepTime(8), "critic": StepTime(12, 0.1)}).emulation == (
        "emulated device: CPU engines take turns, at least 8 ms (solver), 12 ms + 0.1 ms a sequence (critic) a step; "
        "these are not a GPU's figures"
    )
