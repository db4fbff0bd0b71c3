"""Shows and changes the controllers of all devices as if there were one."""

from collections.abc import Mapping

from runtime.config import PolicyChoice
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.controller import Counts
from runtime.control.snapshot import Snapshot
from runtime.devices.handle import DeviceController, DeviceHandle
from runtime.engines.grant import Grant
from runtime.errors import NotFound


class Controllers:
    """The controllers of the devices. They decide alone, by the same policy."""

    def __init__(self, devices: Mapping[str, DeviceHandle], policies: ContainedPolicies) -> None:
        self._devices = devices
        self._policies = policies
        self._choice: PolicyChoice | None = None
        self._paused = False

    @property
    def _each(self) -> list[DeviceController]:
        return [device.controller for device in self._devices.values()]

    @property
    def policy(self) -> str:
        """The name of the policy that decides."""
        return self._each[0].policy

    def use(self, choice: PolicyChoice) -> None:
        """Replace the active policy. Raises ConfigError or PluginError if the new one is invalid, and keeps the old."""
        contained = [self._policies.contain(choice, "policy") for _ in self._devices]
        self._choice = choice
        for controller, policy in zip(self._each, contained, strict=True):
            controller.use(policy)

    @property
    def paused(self) -> bool:
        """True if the controllers are paused."""
        return any(controller.paused for controller in self._each)

    def pause(self) -> None:
        """Stop deciding until `resume`. Grants stay as they are, but no engine's admission stays paused."""
        self._paused = True
        for controller in self._each:
            controller.pause()

    def resume(self) -> None:
        """Start deciding again."""
        self._paused = False
        for controller in self._each:
            controller.resume()

    def match(self, device: str) -> None:
        """Let the controller of a new device use the policy, and be paused, as the others are."""
        controller = self._devices[device].controller
        if self._choice is not None:
            controller.use(self._policies.contain(self._choice, "policy"))
        if self._paused:
            controller.pause()

    def of(self, engine: str) -> DeviceController:
        """Return the controller of an engine, given by the name of its replica. Raises NotFound."""
        for controller in self._each:
            if engine in controller.engines:
                return controller
        known = ", ".join(name for controller in self._each for name in controller.engines)
        raise NotFound(f"there is no engine {engine[:100]!r}; the engines are {known}")

    @property
    def pinned(self) -> dict[str, Grant]:
        """The grants of the pinned engines."""
        return {name: grant for each in self._each for name, grant in each.pinned.items()}

    @property
    def unfit_pins(self) -> dict[str, str]:
        """Return, by engine, why a pin is not in force."""
        return {name: why for each in self._each for name, why in each.unfit_pins.items()}

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The newest snapshot of each device that has one."""
        return {
            name: device.controller.snapshot
            for name, device in self._devices.items()
            if device.controller.snapshot is not None
        }

    @property
    def counts(self) -> Counts:
        """The counts of all controllers together."""
        total = Counts()
        for controller in self._each:
            total.include(controller.counts)
        return total
