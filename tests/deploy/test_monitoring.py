"""Dashboard, rules and alerts use only metrics that the server publishes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import dashboard
from server.settings import REQUEST_BUCKETS, STAGE_BUCKETS
from server.telemetry import aggregation
from server.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
NAME = re.compile(r"(?<![\w:])(?:sana_sprint|process)_\w+")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


def rules() -> list[dict[str, Any]]:
    files = sorted(PROMETHEUS.glob("rules/*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def panel_queries() -> list[str]:
    return [target["expr"] for panel in dashboard.panels() for target in panel.get("targets", [])]


def published() -> set[str]:
    """Returns the names of the series that the server can publish."""
    metrics = Metrics(request_buckets=REQUEST_BUCKETS, stage_buckets=STAGE_BUCKETS)
    metrics.watch_memory(lambda: {"used": 1, "total": 2})
    samples = re.findall(r"^([a-z_]+)", metrics.exposition().decode(), re.MULTILINE)
    families = re.findall(r"^# TYPE (\w+) (\w+)", metrics.exposition().decode(), re.MULTILINE)
    parts = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    return {*samples, "sana_sprint_engine_info", *(name + part for name, kind in families for part in parts[kind])}


def test_dashboard_file_equals_its_source() -> None:
    written = (ROOT / "deploy/grafana/sana-sprint.json").read_text()
    assert written == dashboard.text(), "run: python deploy/grafana/dashboard.py"


def test_panels_do_not_overlap_and_stay_on_the_grid() -> None:
    occupied: set[tuple[int, int]] = set()
    for panel in dashboard.panels():
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not occupied & cells, panel["title"]
        assert max(x for x, _ in cells) < dashboard.WIDTH, panel["title"]
        occupied |= cells


@pytest.mark.parametrize("text", [*panel_queries(), *(rule["expr"] for rule in rules())])
def test_queries_name_published_metrics(text: str) -> None:
    assert set(NAME.findall(text)) - published() == set()


def test_every_alert_has_a_unit_test_and_a_remedy() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tested = {
        case["alertname"]
        for test in yaml.safe_load((PROMETHEUS / "tests/alerts_test.yml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case.get("exp_alerts")
    }
    assert tested == alerts
    operations = (ROOT / "docs/operate/operations.md").read_text()
    assert [alert for alert in sorted(alerts) if f"### {alert}" not in operations] == []


@needs_prometheus
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "deploy/prometheus/prometheus.yml"],
        ["test", "rules", "deploy/prometheus/tests/alerts_test.yml"],
    ],
    ids=["config", "alerts"],
)
def test_promtool_accepts(arguments: list[str]) -> None:
    process = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(what: str, check: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < end, f"{what}: not within {limit_s} s"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def post(url: str, body: dict[str, object]) -> int:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Starts a server with the fake engine on a fake GPU."""
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/helpers/gpu_server.py"), str(port)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/helpers/fakes")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    try:
        until("server", lambda: answers(f"http://127.0.0.1:{port}/health/ready"))
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a real Prometheus with our rules, which scrapes the server every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(PROMETHEUS / "rules", folder / "rules")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [server]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    try:
        until("prometheus", lambda: answers(f"http://127.0.0.1:{port}/-/ready"))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    text = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{text}", timeout=5) as response:
        samples: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return [sample for sample in samples if sample["value"][1] != "NaN"]


def filled(query: str) -> str:
    """Fills a panel's query as Grafana does with both variables on All."""
    return query.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")


def left_side(expression: str) -> str:
    """Returns an alert's expression without its comparison."""
    return re.sub(r"\s(?:>|<|==)\s*[\d.]+\s*$", "", expression.strip().split(" unless ")[0])


ONLY_WHEN_WRONG = "sana_sprint_replaced_kernels"  # one series for each replaced kernel: none on a sound card


@needs_prometheus
def test_every_query_returns_data_from_a_server_under_load(server: str, prometheus: str) -> None:
    queries = {filled(query) for query in panel_queries()}
    queries |= {rule["record"] for rule in rules() if "record" in rule}
    queries |= {left_side(rule["expr"]) for rule in rules() if "alert" in rule}
    queries = {query for query in queries if ONLY_WHEN_WRONG not in query}
    prompts = iter(range(1_000_000))

    def without_data() -> set[str]:
        body = {"prompt": f"a circle, number {next(prompts) // 2}", "width": 64, "height": 64}
        assert post(f"http://{server}/generate", body) == 200
        return {query for query in queries if not ask(prometheus, query)}

    end = time.monotonic() + 60
    while (queries := without_data()) and time.monotonic() < end:
        pass
    assert sorted(queries) == []


@needs_prometheus
@pytest.mark.parametrize("replicas", [1, 2])
def test_promtool_accepts_the_metrics(server: str, replicas: int) -> None:
    assert post(f"http://{server}/generate", {"prompt": "a circle", "width": 64, "height": 64}) == 200
    with urllib.request.urlopen(f"http://{server}/metrics", timeout=5) as response:
        text = response.read()
    if replicas > 1:
        text = aggregation.merge_expositions({str(number): text for number in range(replicas)})
    process = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
