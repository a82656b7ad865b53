"""The RayService: the application accepts its arguments, and its pods fit the schemas of Kubernetes."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import build_engine
from server.cluster.application import NAME, ScalingConfig, parse_scaling_value
from server.cluster.retry import CALLBACK
from server.settings import Settings, flag_of, load_settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = yaml.safe_load((ROOT / "deploy/kubernetes/rayservice.yaml").read_text())
SERVE = yaml.safe_load(DOCUMENT["spec"]["serveConfigV2"])
CLUSTER = DOCUMENT["spec"]["rayClusterConfig"]
TEMPLATES = [CLUSTER["headGroupSpec"]["template"], *(group["template"] for group in CLUSTER["workerGroupSpecs"])]


def test_the_application_accepts_the_arguments() -> None:
    (application,) = SERVE["applications"]
    assert application["name"] == NAME
    module, name = application["import_path"].split(":")
    assert f"def {name}(" in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    arguments = application["args"]
    known = {field.name for field in fields(ScalingConfig)}
    scale = ScalingConfig(
        **{name: parse_scaling_value(name, value) for name, value in arguments.items() if name in known}
    )
    assert (scale.gpus, scale.max_replicas) == (1, CLUSTER["workerGroupSpecs"][0]["maxReplicas"])
    load_settings(
        [word for name, value in arguments.items() if name not in known for word in (flag_of(name), value)], {}
    )


def test_workers_have_the_resources_of_a_replica() -> None:
    resources = TEMPLATES[1]["spec"]["containers"][0]["resources"]
    arguments = SERVE["applications"][0]["args"]
    assert int(resources["limits"]["nvidia.com/gpu"]) == arguments["gpus"]
    assert int(resources["requests"]["cpu"]) >= arguments["cpus"]
    assert TEMPLATES[1]["spec"]["terminationGracePeriodSeconds"] > Settings().shutdown_timeout_s


def test_engines_are_built_before_the_replica_that_serves_them() -> None:
    (builder,), (worker,) = TEMPLATES[1]["spec"]["initContainers"], TEMPLATES[1]["spec"]["containers"]
    assert builder["command"] == ["python", "build_engine.py"]
    spec, arguments = build_engine.parse(builder["args"]), SERVE["applications"][0]["args"]
    assert (spec.model, str(spec.out)) == (arguments["model"], arguments["engine"])
    assert builder["resources"] == worker["resources"]


def test_the_ray_version_is_the_locked_one() -> None:
    assert f"ray=={CLUSTER['rayVersion']}\n" in (ROOT / "requirements-ray.lock").read_text()


@pytest.mark.parametrize("template", TEMPLATES, ids=["head", "worker"])
def test_proxies_retry(template: dict[str, Any]) -> None:
    environment = {item["name"]: item["value"] for item in template["spec"]["containers"][0]["env"]}
    variable, callback = CALLBACK
    assert environment[variable] == callback


@pytest.mark.parametrize("template", TEMPLATES, ids=["head", "worker"])
def test_pods_fit_the_schemas_of_kubernetes(template: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="schemas are not installed: make deploy-tools")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
    kubernetes.validate(pod, "1.30", strict=True)


def test_ray_serve_accepts_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed: pip install 'ray[serve]'")
    schema.ServeDeploySchema.model_validate(SERVE)
