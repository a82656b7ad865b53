"""Renders the Helm chart and validates it with Kubernetes' schemas. `make deploy-tools` installs Helm and schemas."""

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

import build_engine
from server.loading.model_sources import settings_by_model
from server.settings import Settings, load_settings

if find_spec("helm_python") is None:
    pytest.skip("Helm is not installed: make deploy-tools", allow_module_level=True)
kubernetes = pytest.importorskip("kubernetes_validate", reason="schemas are not installed: make deploy-tools")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/kubernetes/sana-sprint-server"
ALL_VALUES = {
    "replicas": 2,
    "autoscaling": {"enabled": True},
    "monitoring": {"enabled": True},
    "apiKeysSecret": "sprint-keys",
    "hubTokenSecret": "hub",
    "hub": "https://hub.example.org",
    "runtimeClassName": "nvidia",
    "engine": {"build": True, "sizes": "1024x1024,512x512"},
    "settings": {"max-queue": 256, "log-level": "warning"},
    "volumes": {"storageClass": "fast"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}
CPU = {"gpu": 0, "image": {"tag": "cpu"}, "model": "tiny"}
EXAMPLES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "examples").glob("*.yaml"))}


@cache
def helm(request: str) -> Any:
    """Returns Helm's result (see helm.py). Raises CalledProcessError if Helm refuses."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "helm.py")]
    process = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    files = helm(json.dumps({"chart": str(CHART), "values": values}))
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (document,) = [document for document in documents if document["kind"] == kind]
    return document


@pytest.mark.parametrize(
    "values", [{}, ALL_VALUES, CPU, *EXAMPLES.values()], ids=["defaults", "everything", "cpu", *EXAMPLES]
)
def test_documents_fit_the_schemas_of_kubernetes(values: dict[str, Any]) -> None:
    for document in rendered(values):
        if not document["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes.validate(document, "1.30", strict=True)


def test_helm_lint_asks_for_an_icon_and_nothing_else() -> None:
    report = helm(json.dumps({"chart": str(CHART)}))
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_kinds_appear_with_their_values() -> None:
    assert sorted(document["kind"] for document in rendered({})) == ["Service", "StatefulSet"]
    kinds = [document["kind"] for document in rendered(ALL_VALUES)]
    assert sorted(kinds) == [
        *("HorizontalPodAutoscaler", "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "PrometheusRule"),
        *("Service", "StatefulSet"),
    ]


def test_settings_are_ones_that_the_server_accepts() -> None:
    container = only(rendered(ALL_VALUES), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    settings = load_settings(
        container["args"], {item["name"]: item["value"] for item in container["env"] if "value" in item}
    )
    assert (settings.max_queue, settings.log_level, settings.model) == (256, "warning", "sprint-0.6b")
    assert settings.api_key_file == "/keys/keys"
    assert settings.port == container["ports"][0]["containerPort"] == Settings().port


def test_the_grace_period_is_longer_than_the_drain() -> None:
    pod = only(rendered({"drain": {"limitSeconds": 90}}), "StatefulSet")["spec"]["template"]["spec"]
    delay = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > 90 + delay


def test_a_gpu_is_requested_only_if_values_name_one() -> None:
    def limits(values: dict[str, Any]) -> dict[str, Any]:
        container: dict[str, Any] = only(rendered(values), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
        return dict(container["resources"]["limits"])

    assert limits({})["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in limits(CPU)


def test_rules_reach_the_cluster_unchanged() -> None:
    specs = [document["spec"] for document in rendered(ALL_VALUES) if document["kind"] == "PrometheusRule"]
    written = [yaml.safe_load(path.read_text()) for path in (ROOT / "deploy/prometheus/rules").glob("*.yml")]
    assert sorted(map(str, specs)) == sorted(map(str, written))


def test_the_alerts_match_the_chart_s_job() -> None:
    (pattern,) = set(re.findall(r'job=~"([^"]+)"', (ROOT / "deploy/prometheus/rules/alerts.yml").read_text()))
    assert re.fullmatch(pattern, only(rendered({}), "StatefulSet")["metadata"]["labels"]["app.kubernetes.io/name"])


@pytest.mark.parametrize("values", [{"gpus": 1}, {"replicas": 0}, {"settings": {"MAX_QUEUE": 3}}])
def test_unknown_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered(values)
    assert refused.value.returncode == 1
    assert "\nhelm: sana-sprint-server:" in refused.value.stderr


def pod(values: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = only(rendered(values), "StatefulSet")["spec"]["template"]["spec"]
    return spec


ONE_MODEL = {name: values for name, values in EXAMPLES.items() if "models" not in values}


@pytest.mark.parametrize("values", [ALL_VALUES, *ONE_MODEL.values()], ids=["everything", *ONE_MODEL])
def test_engines_are_built_before_the_server_that_serves_them(values: dict[str, Any]) -> None:
    (builder,), (server,) = pod(values)["initContainers"], pod(values)["containers"]
    assert builder["command"] == ["python", "build_engine.py"]
    spec = build_engine.parse(builder["args"])
    assert (spec.gpu, spec.precision) == ("native", values["engine"].get("precision", "bf16"))
    assert load_settings(server["args"], {}).engine == str(spec.out)
    assert builder["resources"]["limits"] == server["resources"]["limits"]
    assert {mount["name"]: mount["mountPath"] for mount in builder["volumeMounts"]}.items() <= {
        mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]
    }.items()


def test_a_slice_of_a_card_and_several_cards_are_requested_by_name() -> None:
    def server(name: str) -> tuple[dict[str, Any], Settings]:
        (container,) = pod(EXAMPLES[name])["containers"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        return container["resources"]["limits"], load_settings(container["args"], environment)

    limits, settings = server("mig-slice")
    assert limits["nvidia.com/mig-2g.20gb"] == settings.workers == 1
    assert "nvidia.com/gpu" not in limits
    limits, settings = server("many-cards")
    assert limits["nvidia.com/gpu"] == settings.workers == 4


def test_the_start_limit_sets_the_startup_probe() -> None:
    (container,) = pod({"start": {"limitSeconds": 7200}})["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 7200
    assert probe["httpGet"]["path"] == "/health/ready"  # the other probes wait for the first success


def test_the_hub_s_address_and_token_reach_all_containers() -> None:
    for container in (*pod(ALL_VALUES)["initContainers"], *pod(ALL_VALUES)["containers"]):
        environment = {item["name"]: item for item in container["env"]}
        assert environment["HF_ENDPOINT"]["value"] == "https://hub.example.org"
        assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def test_each_of_several_models_has_its_weights_and_its_engine() -> None:
    spec = pod(EXAMPLES["several-models"])
    (server,) = spec["containers"]
    environment = {item["name"]: item["value"] for item in server["env"] if "value" in item}
    settings = load_settings(server["args"], environment)
    assert settings.models == (("small", "sprint-0.6b"), ("own", "/models/own/sprint-own"))
    assert settings.fast_decoder == "lite"
    served = {name: (one.models[0].source, one.engine) for name, one in settings_by_model(settings).items()}
    builds = [build_engine.parse(builder["args"]) for builder in spec["initContainers"]]
    assert served == {name: (build.model, str(build.out)) for name, build in zip(("small", "own"), builds, strict=True)}
    assert [(build.precision, build.batches) for build in builds] == [("fp8", (1, 2, 4, 8)), ("bf16", (1, 2))]
    assert {build.fast_decoder for build in builds} == {"lite"}
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "model-own"]
    assert volume["persistentVolumeClaim"] == {"claimName": "fine-tune", "readOnly": True}
    small, own = spec["initContainers"]
    assert mounts(own)["model-own"] == mounts(server)["model-own"] == "/models/own"
    assert "model-own" not in mounts(small)


def test_one_of_several_models_may_go_without_an_engine() -> None:
    models = [{"name": "a", "source": "tiny"}, {"name": "b", "claim": "whole-volume", "engine": {"build": False}}]
    spec = pod({"models": models, "engine": {"build": True}})
    (server,), (builder,) = spec["containers"], spec["initContainers"]
    assert builder["name"] == "engines-a"
    each = settings_by_model(load_settings(server["args"], {}))
    assert {name: one.engine for name, one in each.items()} == {"a": "/engines/a", "b": None}
    assert each["b"].models[0].source == "/models/b"
    only_b = pod({"models": [models[0], {**models[1], "engine": {"build": True}}]})
    assert [one["name"] for one in only_b["initContainers"]] == ["engines-b"]


def test_the_decoders_of_the_settings_are_built() -> None:
    (builder,) = pod({"engine": {"build": True}, "settings": {"decoder": "lite"}})["initContainers"]
    assert (build_engine.parse(builder["args"]).decoder, build_engine.parse(builder["args"]).fast_decoder) == (
        "lite",
        None,
    )


def test_the_fused_adapters_of_the_settings_are_built() -> None:
    def built(values: dict[str, Any]) -> list[tuple[str, ...]]:
        arguments = [one["args"] for one in pod(values)["initContainers"]]
        return [tuple(map(str, build_engine.parse(each).lora)) for each in arguments]

    one = {"engine": {"build": True}, "settings": {"lora": "a=/weights/a:0.5,b=/weights/b,c=/weights/c:-1"}}
    assert built(one) == [("a=/weights/a:0.5", "c=/weights/c:-1")]
    models = [{"name": name, "source": f"/models/{name}", "engine": {"build": True}} for name in ("x", "y")]
    assert built({"models": models, "settings": {"lora": "x:a=/weights/a:1,y:b=/weights/b:2"}}) == [
        ("a=/weights/a:1",),
        ("b=/weights/b:2",),
    ]


@pytest.mark.parametrize(
    "models",
    [
        [{"name": "a"}],
        [{"name": "a", "source": "x", "weights": "1Gi"}],
        [{"name": "A_b", "source": "x"}],
        [{"name": "a", "source": "x"}, {"name": "a", "source": "y"}],
    ],
)
def test_models_without_weights_or_with_a_name_twice_are_refused(models: list[dict[str, str]]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        rendered({"models": models})
