"""Derives from a job's events what its next run needs: the replies to replay, and the time already worked.

Pure functions of all events of one job, in order.
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
    """Return the replies that the job's workflow takes again before it makes its next call, with their tools.

    The second value holds the calls of tools that belong to calls without a reply, by the number of the call.
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

    A run lasts until the event that ends it. If a stop or a crash of the runtime ended it, it counts until its last
    reply, because the journal does not say how long the run lasted after that.
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
