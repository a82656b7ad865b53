"""The Helm chart, rendered by Helm's own code and held against Kubernetes' schemas. `make deploy-tools` brings both."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings, read

if find_spec("helm_python") is None:
    pytest.skip("Helm is not installed: make deploy-tools", allow_module_level=True)
kubernetes = pytest.importorskip("kubernetes_validate", reason="schemas are not installed: make deploy-tools")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/kubernetes/sana-sprint-server"
EVERYTHING = {
    "replicas": 2,
    "autoscaling": {"enabled": True},
    "monitoring": {"enabled": True},
    "apiKeysSecret": "sprint-keys",
    "settings": {"max-queue": 256, "log-level": "warning"},
    "volumes": {"storageClass": "fast"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}
CPU = {"gpu": 0, "image": {"tag": "cpu"}, "model": "tiny"}


@cache
def helm(asked: str) -> Any:
    """What Helm answers (see helm.py). Raises CalledProcessError where it refuses."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "helm.py")]
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    files = helm(json.dumps({"chart": str(CHART), "values": values}))
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def one(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


@pytest.mark.parametrize("values", [{}, EVERYTHING, CPU], ids=["defaults", "everything", "cpu"])
def test_documents_fit_the_schemas_of_kubernetes(values: dict[str, Any]) -> None:
    for document in rendered(values):
        if not document["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes.validate(document, "1.30", strict=True)


def test_helm_lint_asks_for_an_icon_and_nothing_else() -> None:
    found = helm(json.dumps({"chart": str(CHART)}))
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


def test_kinds_come_with_what_asks_for_them() -> None:
    assert sorted(document["kind"] for document in rendered({})) == ["Service", "StatefulSet"]
    kinds = [document["kind"] for document in rendered(EVERYTHING)]
    assert sorted(kinds) == [
        *("HorizontalPodAutoscaler", "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "PrometheusRule"),
        *("Service", "StatefulSet"),
    ]


def test_settings_are_ones_that_the_server_accepts() -> None:
    container = one(rendered(EVERYTHING), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    settings = read(container["args"], {item["name"]: item["value"] for item in container["env"]})
    assert (settings.max_queue, settings.log_level, settings.model) == (256, "warning", "sprint-0.6b")
    assert settings.api_key_file == "/keys/keys"
    assert settings.port == container["ports"][0]["containerPort"] == Settings().port


def test_the_grace_period_is_longer_than_the_drain() -> None:
    pod = one(rendered({"drain": {"limitSeconds": 90}}), "StatefulSet")["spec"]["template"]["spec"]
    delay = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > 90 + delay


def test_a_gpu_is_asked_for_only_where_wanted() -> None:
    def limits(values: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = one(rendered(values), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
        return dict(found["resources"]["limits"])

    assert limits({})["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in limits(CPU)


def test_rules_reach_the_cluster_as_they_are() -> None:
    found = [document["spec"] for document in rendered(EVERYTHING) if document["kind"] == "PrometheusRule"]
    written = [yaml.safe_load(path.read_text()) for path in (ROOT / "deploy/prometheus/rules").glob("*.yml")]
    assert sorted(map(str, found)) == sorted(map(str, written))


def test_the_alerts_see_the_jobs_that_the_chart_names() -> None:
    (pattern,) = set(re.findall(r'job=~"([^"]+)"', (ROOT / "deploy/prometheus/rules/alerts.yml").read_text()))
    assert re.fullmatch(pattern, one(rendered({}), "StatefulSet")["metadata"]["labels"]["app.kubernetes.io/name"])


@pytest.mark.parametrize("values", [{"gpus": 1}, {"replicas": 0}, {"settings": {"MAX_QUEUE": 3}}])
def test_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered(values)
    assert refused.value.returncode == 1
    assert "\nhelm: sana-sprint-server:" in refused.value.stderr
