"""The changes that an operator can make to a running controller; HTTP and MQTT both offer them."""

from dataclasses import replace

from pydantic import ConfigDict, Field, StrictBool

from agents.role import Value
from runtime.assembly import RunningTeam
from runtime.config import PolicyChoice


class Policy(Value):
    """A policy's name; every other key is an option of the policy."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1, max_length=200)


class Change(Value):
    """A change of the controller: whether it is paused, and which policy decides. Omitted keys change nothing."""

    paused: StrictBool | None = Field(default=None, description="True stops deciding; grants stay. False resumes.")
    policy: Policy | None = Field(default=None, description="The policy that decides from now on.")

    def apply(self, running_team: RunningTeam) -> None:
        """Apply the change. Raises ConfigError or PluginError, and then nothing has changed."""
        if self.policy is not None:
            running_team.controllers.use(PolicyChoice.model_validate(self.policy.model_dump()))
        if self.paused is True:
            running_team.controllers.pause()
        elif self.paused is False:
            running_team.controllers.resume()


class Pin(Value):
    """The grant at which to hold an engine. Omitted keys keep their current values."""

    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, description="Share of the device's memory, weights included."
    )
    max_active_seqs: int | None = Field(default=None, ge=1, le=2**31, description="Sequences that may run at once.")
    max_step_tokens: int | None = Field(default=None, ge=1, le=2**31, description="Tokens that a step may carry.")

    def apply(self, running_team: RunningTeam, engine: str) -> None:
        """Pin an engine; policies divide the rest. Raises NotFound and InputError, and then nothing has changed."""
        controller = running_team.controllers.of(engine)
        changes = self.model_dump(include={*Pin.model_fields}, exclude_none=True)
        controller.pin(engine, replace(controller.current_grant(engine), **changes))


def unpin(running_team: RunningTeam, engine: str) -> None:
    """Let policies decide about an engine again. Raises NotFound."""
    running_team.controllers.of(engine).unpin(engine)
