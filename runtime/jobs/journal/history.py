"""Derives the state from which a job resumes: the replies to replay, their tool calls, and the time already worked.

The functions are pure. They take all events of one job, in order.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from agents.tool_protocol import ToolUse
from runtime.jobs.job import JobState
from runtime.jobs.journal import records
from runtime.jobs.journal.records import INTERRUPTED, JobEvent
from runtime.jobs.reply_record import StoredReply
from runtime.jobs.tool_record import ToolRecord


def resumed(events: Sequence[JobEvent]) -> tuple[list[StoredReply], dict[int, list[ToolRecord]]]:
    """Return the replies to replay, with their tool calls, and the tool calls of each call without a reply.

    The keys of the second value are the numbers of the workflow's calls.
    """
    replies: list[StoredReply] = []
    tools: defaultdict[int, list[ToolRecord]] = defaultdict(list)
    for event in events:
        match event.kind:
            case records.RESTARTED:
                replies.clear()
                tools.clear()
            case records.TOOL_CALLED:
                tools[event.data["number"]].append(ToolRecord.from_json(event.data))
            case records.TOOL_RETURNED if tools.get(event.data["number"]):
                called = tools[event.data["number"]]
                use = ToolUse(called[-1].call, event.data["output"], event.data["failed"])
                called[-1] = replace(called[-1], use=use)
            case records.REPLIED:
                reply = StoredReply.from_json(event.data)
                replies.append(replace(reply, tools=tuple(tools.pop(reply.number, ()))))
    return replies, dict(tools)


def worked_s(events: Sequence[JobEvent]) -> float:
    """Return the seconds for which the job ran before it was last queued.

    A run lasts until the event that ends it. If a stop or a crash of the runtime ended the run, count the run until its
    last event, because the journal does not say how long the run lasted after that event.
    """
    total_s, started_at, previous_at = 0.0, None, 0.0
    for event in events:
        if event.kind == JobState.RUNNING:
            started_at = event.at
        elif started_at is not None and event.kind == JobState.QUEUED:
            ended_at = previous_at if event.data.get("why") == INTERRUPTED else event.at
            total_s += ended_at - started_at
            started_at = None
        previous_at = event.at
    return total_s
