"""The trace of a job on real vLLM engines, one of which reports its own spans."""

import pytest

from tests.e2e.conftest import Command
from tests.runtime.tracing.receiver import grpc_receiver, values

pytestmark = pytest.mark.e2e


def test_spans_of_vllm_are_below_ours(troupe: Command) -> None:
    with grpc_receiver() as receiver:
        (troupe.folder / "traced.yaml").write_text(
            f"extends: embedded\ntraces: {{endpoint: {receiver.url}}}\n"
            f"engines: {{solver: {{vllm: {{otlp_traces_endpoint: {receiver.url}}}}}}}\n"
        )
        done = troupe.run("solve", "12+7", "--config", "traced.yaml")
        assert done.returncode == 0, done.stderr
    root = receiver.one("invoke_workflow deliberate")
    assert [span.name for span in receiver.below(root)] == [
        f"invoke_agent {n}" for n in ("planner", "solver", "critic")
    ]
    request = receiver.one("chat solver")
    [own] = receiver.below(request)
    assert own.name == "llm_request"
    ours, theirs = values(request.attributes), values(own.attributes)
    assert theirs["gen_ai.usage.completion_tokens"] == ours["gen_ai.usage.output_tokens"]
    assert receiver.below(receiver.one("chat critic")) == []
    troupe.nothing_left()
