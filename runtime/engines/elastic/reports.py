"""The reports of an engine core to its client in another process: its limits, and the results of resizes.

vLLM encodes the result of a utility call with msgspec: a dataclass is sent as a map of its fields, and the client
receives that map. `parse_limits` and `parse_report` rebuild the dataclass. The field `state` tells the reports apart.

If VLLM_ALLOW_INSECURE_SERIALIZATION is set, vLLM rebuilds the dataclass itself; both functions then return it as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from runtime.engines.grant import EngineLimits


@dataclass(frozen=True)
class ResizeApplied:
    """A resize that is complete.

    `moved_bytes` were backed or released in `seconds`. The engine's steps waited `stall_seconds` of these.
    `preempted` requests lost their blocks; vLLM recomputes them.
    """

    kv_cache_bytes: int
    moved_bytes: int
    seconds: float
    stall_seconds: float
    preempted: int
    state: Literal["applied"] = "applied"


@dataclass(frozen=True)
class ResizeDeferred:
    """A shrink to `kv_cache_bytes` that waits for running requests; until it is applied, `held_bytes` more are held."""

    kv_cache_bytes: int
    held_bytes: int
    state: Literal["deferred"] = "deferred"


@dataclass(frozen=True)
class ResizeRefused:
    """A resize that changed nothing, and why."""

    reason: str
    state: Literal["refused"] = "refused"


@dataclass(frozen=True)
class ResizeSuperseded:
    """A deferred shrink that a later resize replaced."""

    state: Literal["superseded"] = "superseded"


ResizeReport = ResizeApplied | ResizeDeferred | ResizeRefused | ResizeSuperseded

WORK = "troupe_work"
"""The key of an engine's Work, as a tuple, in vLLM's `kv_connector_stats`."""
PREEMPTIONS = "troupe_preemptions"
"""The key of the number of an engine's preemptions since it started, in the same place."""
_LIMITS = TypeAdapter(EngineLimits)
_REPORT: TypeAdapter[ResizeReport] = TypeAdapter(Annotated[ResizeReport, Field(discriminator="state")])


def parse_limits(result: Mapping[str, Any] | EngineLimits) -> EngineLimits:
    """Rebuild an engine's limits. Raises pydantic.ValidationError if the fields do not fit."""
    return _LIMITS.validate_python(result)


def parse_report(result: Mapping[str, Any] | ResizeReport) -> ResizeReport:
    """Rebuild the report of a resize. Raises pydantic.ValidationError if the fields fit no report."""
    return _REPORT.validate_python(result)
