"""The files of configs/deploy, parsed."""

import json
import re
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "configs" / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
GPU = DEPLOY / "compose.gpu.yaml"
VARIANTS = {"cpu": (COMPOSE,), "cuda": (COMPOSE, GPU)}
"""The compose files of each variant, in the order in which Compose merges them."""
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "troupe.json"
PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
KUBERAY = DEPLOY / "kuberay.yaml"
UNIT = DEPLOY / "troupe.service"


def needs_program(name: str) -> pytest.MarkDecorator:
    """Skip a test whose program is missing, also in CI: scripts/test.sh does not install it."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


def loaded(path: Path) -> Any:
    """Parse a YAML or JSON file. The variables of a compose file keep their defaults; KubeRay's file is a list."""
    text = path.read_text()
    if path == KUBERAY:
        return list(yaml.safe_load_all(text))
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def services(variant: str) -> dict[str, dict[str, Any]]:
    """Return the services of a variant, merged as Compose merges them."""
    merged: dict[str, dict[str, Any]] = reduce(_merge, (loaded(path)["services"] for path in VARIANTS[variant]))
    return merged


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return what a service mounts, by the path in the container: a path on the host, or the name of a volume."""
    parts = [entry.split(":") for entry in service.get("volumes", ())]
    return {target: source for source, target, *_ in parts}


def _merge(base: Any, over: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        merged = {name: _merge(base[name], over[name], name) for name in base.keys() & over.keys()}
        return {**base, **over, **merged}
    if key == "volumes":  # the later mount at a path wins
        targets = {entry.split(":")[1] for entry in over}
        return [entry for entry in base if entry.split(":")[1] not in targets] + over
    return over
