import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import ByteSize

from agents.tool import spec_of
from runtime.tools.function.function_tool import WORKERS, FunctionTool
from runtime.tools.tool import ToolError
from tests.runtime.tools.function import functions
from tests.runtime.tools.processes import LONG_S, all_end, below, until

ROOT = Path(__file__).resolve().parents[4]


def tool(name: str, timeout_s: float = LONG_S, output_max_bytes: int = 1000) -> FunctionTool:
    spec = spec_of(name, getattr(functions, name))
    options = FunctionTool.Options(timeout_s=timeout_s, output_max_bytes=ByteSize(output_max_bytes))
    return FunctionTool(spec, f"{functions.__name__}:{name}", options)


async def test_arguments_arrive_as_declared_types() -> None:
    async with tool("area") as area:
        assert await area.call({"box": {"width": "3", "unit": "m"}}) == "Box <Unit.METRE: 'm'> 9"
        assert await area.call({"box": {"width": 2}, "times": 5}) == "Box <Unit.METRE: 'm'> 20"
        with pytest.raises(ToolError, match=r"box\.width: input should be a valid integer"):
            await area.call({"box": {"width": "wide"}})


async def test_values_are_written_as_json() -> None:
    async with tool("boxes") as boxes:
        assert json.loads(await boxes.call({"count": 2})) == [{"width": 0, "unit": "m"}, {"width": 1, "unit": "m"}]


async def test_async_function() -> None:
    async with tool("slowly") as slowly:
        assert await slowly.call({"text": "line\nline"}) == "line\nline"


async def test_worker_starts_with_the_first_call_and_is_reused() -> None:
    before = below(os.getpid())
    async with tool("pid") as pid:
        assert below(os.getpid()) == before
        assert await pid.call({}) == await pid.call({})


async def test_overlapping_calls_have_workers_of_their_own_up_to_the_bound() -> None:
    async with tool("pid_after") as pid_after:
        pids = await asyncio.gather(*(pid_after.call({"seconds": 0.2}) for _ in range(2 * WORKERS)))
        assert 1 < len(set(pids)) <= WORKERS
    await all_end(map(int, pids))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "^ValueError: a bad thing$"),
        ("leaves", "^SystemExit: 3$"),
        ("opaque", "it returned a object, which cannot be written as JSON"),
        ("prints_and_exits", "ended with exit status 7 before it answered; it last printed: last words"),
        ("segfaults", "ended by SIGSEGV before it answered"),
        ("kills_itself", "ended by SIGKILL before it answered"),
        ("closes_everything", "closed the connection"),
        ("writes_to_the_connection", "broke the protocol"),
    ],
)
async def test_failure_is_one_tool_error_and_the_next_call_gets_it_again(name: str, message: str) -> None:
    before = below(os.getpid())
    async with tool(name) as failing:
        for _ in range(2):
            with pytest.raises(ToolError, match=message):
                await failing.call({})
    await all_end(below(os.getpid()) - before)


async def test_function_may_close_stdout() -> None:
    async with tool("closes_stdout") as closes:
        assert await closes.call({}) == "still here"


async def test_function_that_forks_answers_once() -> None:
    async with tool("forks") as forks:
        assert [await forks.call({}) for _ in range(3)] == ["forked"] * 3


async def test_long_output_is_cut_between_characters_and_says_so() -> None:
    async with tool("long", output_max_bytes=65) as long:
        assert await long.call({"size": 32}) == "é" * 32
        assert await long.call({"size": 33}) == "é" * 32 + "\n... 2 more bytes were cut"
        assert (await long.call({"size": 10_000_000})).endswith("\n... 19999936 more bytes were cut")


async def test_any_text_arrives() -> None:
    async with tool("surrogate") as surrogate:
        assert await surrogate.call({"fail": False}) == "?"
        with pytest.raises(ToolError, match=r"^ValueError: \?$"):
            await surrogate.call({"fail": True})
    async with tool("controls", output_max_bytes=1 << 20) as controls:
        assert await controls.call({"size": 1 << 20}) == "\0" * (1 << 20)


async def test_printing_for_ever_takes_no_memory_here() -> None:
    async with tool("floods", timeout_s=3) as floods:
        before_bytes = psutil.Process().memory_info().rss
        with pytest.raises(ToolError, match="floods did not end within 3 s"):
            await floods.call({})
        assert psutil.Process().memory_info().rss - before_bytes < 64 << 20


async def read_pids(file: Path) -> list[int]:
    def read() -> list[int]:
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    await until(lambda: len(read()) == 2)
    return read()


async def test_timeout_ends_daemons_too_and_leaves_other_calls_alone(tmp_path: Path) -> None:
    async with tool("hangs", timeout_s=10) as hangs:
        with pytest.raises(ToolError, match="hangs did not end within 10 s"):
            await hangs.call({"file": str(tmp_path / "pids")})
        await all_end(await read_pids(tmp_path / "pids"))


async def test_stopped_guard_is_killed_with_its_worker() -> None:
    before = below(os.getpid())
    async with tool("stops_its_guard", timeout_s=2) as stops:
        with pytest.raises(ToolError, match="did not end within 2 s"):
            await stops.call({})
        assert below(os.getpid()) == before


async def test_cancelled_call_ends_what_it_started(tmp_path: Path) -> None:
    async with tool("hangs") as hangs:
        call = asyncio.create_task(hangs.call({"file": str(tmp_path / "pids")}))
        pids = await read_pids(tmp_path / "pids")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await all_end(pids)


async def test_leaving_ends_running_calls_and_refuses_further_ones(tmp_path: Path) -> None:
    async with tool("hangs") as hangs:
        call = asyncio.create_task(hangs.call({"file": str(tmp_path / "pids")}))
        pids = await read_pids(tmp_path / "pids")
    with pytest.raises(ToolError, match="hangs failed"):
        await call
    await all_end(pids)
    with pytest.raises(ToolError, match="the runtime is stopping"):
        await hangs.call({"file": ""})


async def test_daemon_of_a_call_that_returned_ends_with_the_tool() -> None:
    async with tool("daemon") as daemon:
        pid = int(await daemon.call({}))
        assert psutil.pid_exists(pid)
    await all_end([pid])


async def test_missing_function_is_a_tool_error() -> None:
    missing = FunctionTool(spec_of("pid", functions.pid), f"{functions.__name__}:missing")
    async with missing:
        with pytest.raises(ToolError, match="functions:missing cannot be loaded: AttributeError"):
            await missing.call({})


async def test_workers_end_if_the_runtime_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio
from tests.runtime.tools.function.test_function_tool import tool
async def main():
    async with tool("hangs") as hangs:
        await hangs.call({{"file": {str(tmp_path / "pids")!r}}})
asyncio.run(main())
"""
    runtime = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT)
    pids = await read_pids(tmp_path / "pids")
    workers = below(runtime.pid)
    assert workers >= {pids[0]}
    runtime.send_signal(signal.SIGKILL)
    await runtime.wait()
    await all_end({*workers, *pids})
