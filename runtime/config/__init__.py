"""The configuration: reads YAML files, validates them once, and returns frozen values.

The only package that reads YAML. A configuration can extend another one (`extends`), whose mappings it merges with its
own key by key. Every error names the file, the key and what would be right.
"""

from runtime.config.complaint import complaint
from runtime.config.files import DEFAULT, SHIPPED, as_yaml, find, is_role_file, load, read_yaml
from runtime.config.sections import (
    Choice,
    Cluster,
    Config,
    Control,
    Device,
    Member,
    Mqtt,
    PolicyChoice,
    Residency,
    ResidencyChoice,
    Service,
    Tool,
    Traces,
    WorkflowChoice,
)

__all__ = [
    "DEFAULT",
    "SHIPPED",
    "Choice",
    "Cluster",
    "Config",
    "Control",
    "Device",
    "Member",
    "Mqtt",
    "PolicyChoice",
    "Residency",
    "ResidencyChoice",
    "Service",
    "Tool",
    "Traces",
    "WorkflowChoice",
    "as_yaml",
    "complaint",
    "find",
    "is_role_file",
    "load",
    "read_yaml",
]
