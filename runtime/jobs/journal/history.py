"""Derives from a job's events what its next run needs: the replies to replay, and the time already worked.

Pure functions of all events of one job, in order.
"""

from collections.abc import Sequence

from runtime.jobs.job import JobState
from runtime.jobs.journal.records import INTERRUPTED, REPLIED, RESTARTED, JobEvent
from runtime.jobs.reply_record import ReplyRecord


def replies_to_replay(events: Sequence[JobEvent]) -> list[ReplyRecord]:
    """Return the replies that the job's workflow takes again before it makes its next call."""
    replies: list[ReplyRecord] = []
    for event in events:
        if event.kind == RESTARTED:
            replies.clear()
        elif event.kind == REPLIED:
            replies.append(ReplyRecord.from_json(event.data))
    return replies


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
