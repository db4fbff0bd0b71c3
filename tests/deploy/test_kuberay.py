"""The manifest for Kubernetes: its parts agree with each other, with the image and with the configuration."""

from pathlib import Path
from typing import Any

import yaml

from runtime import config
from runtime.cluster.ray_nodes import SETTINGS
from tests.deploy.files import DEPLOY, KUBERAY, ROOT, loaded


def document(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in loaded(KUBERAY) if each["kind"] == kind)
    return found


def groups() -> list[dict[str, Any]]:
    """Return the specifications of the pods: the head's, then the workers'."""
    spec = document("RayCluster")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_the_team_is_a_valid_configuration_for_this_cluster(tmp_path: Path) -> None:
    path = tmp_path / "team.yaml"
    path.write_text(document("ConfigMap")["data"]["team.yaml"])
    found = config.load(str(path))
    assert found.cluster is not None
    assert found.cluster.address == "auto"
    assert not found.cluster.open
    assert found.devices == "all"


def test_only_workers_have_the_resource_that_agents_need() -> None:
    team = yaml.safe_load(document("ConfigMap")["data"]["team.yaml"])
    assert team["cluster"]["nodes_with"] == "GPU"
    head, worker = groups()
    assert head["rayStartParams"]["num-gpus"] == "0"
    [container] = worker["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_every_mounted_volume_exists() -> None:
    kept = {document("ConfigMap")["metadata"]["name"], document("PersistentVolumeClaim")["metadata"]["name"]}
    named = set()
    for group in groups():
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            named |= {value for part in volume.values() if isinstance(part, dict) for value in part.values()}
    assert kept <= named


def test_the_cluster_asks_for_a_token_and_runs_engines_at_normal_priority() -> None:
    spec = document("RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in groups():
        [container] = group["template"]["spec"]["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == SETTINGS


def test_the_state_belongs_to_the_user_of_the_image() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    head = groups()[0]["template"]["spec"]
    assert f"--uid {head['securityContext']['fsGroup']} " in dockerfile
    [container] = head["containers"]
    state = next(mount for mount in container["volumeMounts"] if mount["name"] == "state")
    assert f"TROUPE_HOME={state['mountPath']}" in dockerfile


def test_the_commands_start_ray_and_the_service() -> None:
    assert document("RayCluster")["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for group in groups():
        [container] = group["template"]["spec"]["containers"]
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
    [head] = groups()[0]["template"]["spec"]["containers"]
    team = next(mount for mount in head["volumeMounts"] if mount["name"] == "team")
    assert f"troupe serve --config {team['mountPath']}/team.yaml" in head["args"][0]


def test_the_version_of_ray_is_the_tested_one() -> None:
    tested = (ROOT / "scripts" / "constraints-test.txt").read_text()
    assert f"ray=={document('RayCluster')['spec']['rayVersion']}" in tested.splitlines()
