"""Agent frameworks use the seats' models with tools. Each runs in an environment of its own, as a user installs it.

The engines are modelled: the planner hands over to an agent that adds, and the solver calls a tool and reads its
result. vLLM's handlers and parsers are between them and the frameworks.
"""

import asyncio
import json
import sys
import venv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from tests.runtime.api.http.conftest import Served, configured, service

OPENAI_AGENTS = """
import sys
from agents import Agent, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI

@function_tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

set_tracing_disabled(True)
set_default_openai_client(AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none"))
adder = Agent(name="adder", instructions="Add.", model="solver", tools=[add])
planner = Agent(name="planner", instructions="Hand over.", model="planner", handoffs=[adder])
result = Runner.run_sync(planner, "12+7")
print(result.last_agent.name, result.final_output)
"""
LANGGRAPH = """
import sys
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

@tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

model = ChatOpenAI(model="solver", base_url=sys.argv[1] + "/v1", api_key="none").bind_tools([add])
graph = StateGraph(MessagesState)
graph.add_node("agent", lambda state: {"messages": [model.invoke(state["messages"])]})
graph.add_node("tools", ToolNode([add]))
graph.set_entry_point("agent")
graph.add_conditional_edges("agent", tools_condition)
graph.add_edge("tools", "agent")
messages = graph.compile().invoke({"messages": [("user", "12+7")]})["messages"]
print([message.type for message in messages], messages[-1].content)
"""


def adder(request: GenerateRequest) -> str:
    """Call the tool `add`, unless its result, 19, is the last message."""
    assert request.rendered is not None
    return "It is 19" if "19" in request.rendered["prompt"] else _call("add", a=12, b=7)


def _call(tool: str, **arguments: int) -> str:
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
async def calling(tmp_path: Path) -> AsyncIterator[Served]:
    chosen = configured(tmp_path)
    engines = {name: spec.model_copy(update={"tool_call_parser": "hermes"}) for name, spec in chosen.engines.items()}
    async with service(chosen.model_copy(update={"engines": engines})) as served:
        for name, script in {"solver": adder, "planner": lambda _: _call("transfer_to_adder")}.items():
            engine = served.backend.engines[name]
            assert isinstance(engine, FakeEngine)
            engine._script = script
        yield served


@pytest.mark.parametrize(
    ("packages", "program", "printed"),
    [
        (["openai-agents==0.24.0"], OPENAI_AGENTS, "adder It is 19"),
        (["langgraph==1.2.24", "langchain-openai==1.7.4"], LANGGRAPH, "['human', 'ai', 'tool', 'ai'] It is 19"),
    ],
    ids=["openai-agents", "langgraph"],
)
async def test_a_framework_calls_tools(
    calling: Served, tmp_path: Path, packages: list[str], program: str, printed: str
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin" / "python")
    await _run(tmp_path, sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *packages)
    assert (await _run(tmp_path, python, "-c", program, calling.url)).strip() == printed


async def _run(folder: Path, *command: str) -> str:
    """Run a command in a folder that has no package `agents`, which OpenAI's SDK has too. Return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
