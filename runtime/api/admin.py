"""What can be asked of a running controller, by whichever door."""

from dataclasses import replace

from pydantic import ConfigDict, Field, StrictBool

from agents.role import Value
from runtime.assembly import RunningTeam
from runtime.config import PolicyChoice
from runtime.errors import NotFound


class Policy(Value):
    """A policy by its name; every other key is one of its options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1, max_length=200)


class Change(Value):
    """What is to change: whether the controller is paused, and which policy decides."""

    paused: StrictBool | None = None
    policy: Policy | None = None

    def apply(self, running_team: RunningTeam) -> None:
        """Do it. Raises ConfigError, PluginError, and then nothing has changed."""
        if self.policy is not None:
            running_team.use_policy(PolicyChoice.model_validate(self.policy.model_dump()))
        if self.paused is not None:
            (running_team.controller.pause if self.paused else running_team.controller.resume)()


class Pin(Value):
    """The grant to hold an engine at; what is left out stays as it is."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    max_active_seqs: int | None = Field(default=None, ge=1, le=2**31)
    max_step_tokens: int | None = Field(default=None, ge=1, le=2**31)

    def apply(self, running_team: RunningTeam, engine: str) -> None:
        """Pin it; policies divide what is left. Raises what Controller.pin does, and then nothing has changed."""
        known(running_team, engine)
        has = running_team.engines[engine].stats().grant
        running_team.controller.pin(
            engine, has and replace(has, **self.model_dump(include={*Pin.model_fields}, exclude_none=True))
        )


def unpin(running_team: RunningTeam, engine: str) -> None:
    """Let policies decide about an engine again. Raises NotFound."""
    known(running_team, engine)
    running_team.controller.unpin(engine)


def known(running_team: RunningTeam, engine: str) -> None:
    """Raise NotFound where there is no such engine."""
    if engine not in running_team.engines:
        raise NotFound(f"there is no engine {engine[:100]!r}; there are {', '.join(running_team.engines)}")
