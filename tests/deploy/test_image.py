"""Dockerfile and compose file: every file that they name exists, and the server accepts every setting."""

import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

import build_engine
from deploy.check_image import readme_flags, volumes_of
from deploy.lock import LOCKS
from server.loading.model_sources import settings_by_model
from server.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVERS = ("server", "server-gpu", "server-rtx", "server-models")
PROFILES = ("cpu", "gpu", "rtx", "models")


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    sources = [
        word for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) == context
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_every_flavour_has_its_lock() -> None:
    (flavours,) = re.findall(r"case \"\$\{FLAVOUR\}\" in ([a-z|]+)\)", DOCKERFILE)
    locks = {f"requirements-{flavour}.lock" for flavour in flavours.split("|")}
    assert locks == set(re.findall(r"requirements-\w+\.lock", re.search(r"^COPY req.*$", DOCKERFILE, re.MULTILINE)[0]))  # type: ignore[index]
    assert locks <= set(LOCKS)


def test_the_server_accepts_the_image_s_variables() -> None:
    environment = dict(re.findall(r"^\s*(?:ENV )?(SPRINT_\w+)=(\S+?)(?: \\)?$", DOCKERFILE, re.MULTILINE))
    assert load_settings([], environment) == Settings(host="0.0.0.0")
    assert f"EXPOSE {Settings().port}" in DOCKERFILE


def test_the_image_runs_as_nobody_and_takes_signals() -> None:
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert 'ENTRYPOINT ["python", "-m", "server"]' in final


def test_the_readme_s_command_fits_the_image() -> None:
    flags = readme_flags()
    assert "--read-only" in flags
    assert f"127.0.0.1:{Settings().port}:{Settings().port}" in flags
    declared = re.search(r"^VOLUME \[(.+)\]$", DOCKERFILE, re.MULTILINE)
    assert declared is not None
    assert {f'"{folder}"' for folder in volumes_of(flags).values()} == set(declared[1].split(", "))


def service(name: str) -> dict[str, Any]:
    """Returns a service with the defaults of its variables."""
    text = json.dumps(COMPOSE["services"][name])
    config: dict[str, Any] = json.loads(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return config


def started(profile: str) -> set[str]:
    """Returns the services that `docker compose --profile PROFILE up` starts."""
    profiles = {name: config.get("profiles") for name, config in COMPOSE["services"].items()}
    return {name for name, names in profiles.items() if not names or profile in names}


def test_without_a_profile_the_cpu_serves() -> None:
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / ".env").read_text()
    assert started("cpu") == {"server", "prometheus", "grafana"}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_starts_one_server_with_its_dashboard_and_no_port_twice(profile: str) -> None:
    names = started(profile)
    assert len(names & set(SERVERS)) == 1
    assert {"prometheus", "grafana"} <= names
    ports = [port.split(":")[1] for name in names for port in service(name)["ports"]]
    assert len(ports) == len(set(ports)) == 3


@pytest.mark.parametrize("profile", ["gpu", "rtx"])
def test_engines_are_built_before_the_server_that_serves_them(profile: str) -> None:
    builder, server = service(f"engines-{profile}"), service(f"server-{profile}")
    assert builder["entrypoint"] == ["python", "build_engine.py"]
    spec, settings = build_engine.parse(builder["command"]), load_settings(server["command"], {})
    assert (spec.model, str(spec.out)) == (settings.model, settings.engine)
    assert server["depends_on"] == {f"engines-{profile}": {"condition": "service_completed_successfully"}}
    assert builder["image"] == server["image"] == f"sana-sprint-server:{profile}"
    assert builder["build"]["args"]["FLAVOUR"] == profile
    assert builder["volumes"] == server["volumes"]
    assert builder["deploy"] == server["deploy"]
    assert builder["restart"] == "no"


def test_each_of_two_models_is_served_from_the_engine_that_was_built_of_it() -> None:
    builders = [service(name) for name in ("engines-gpu", "engines-second")]
    server = service("server-models")
    assert started("models") == {"engines-gpu", "engines-second", "server-models", "prometheus", "grafana"}
    each = settings_by_model(load_settings(server["command"], {}))
    specs = [build_engine.parse(builder["command"]) for builder in builders]
    assert {name: (one.models[0].source, one.engine) for name, one in each.items()} == {
        name: (spec.model, str(spec.out)) for name, spec in zip(("first", "second"), specs, strict=True)
    }
    done = {"condition": "service_completed_successfully"}
    assert (builders[1]["depends_on"], server["depends_on"]) == ({"engines-gpu": done}, {"engines-second": done})
    for builder in builders:
        assert (builder["image"], builder["volumes"], builder["deploy"]) == (
            server["image"],
            server["volumes"],
            server["deploy"],
        )


def test_the_quick_start_names_services_and_profiles_of_compose() -> None:
    page = (ROOT / "docs/use/gpu-quickstart.md").read_text()
    lines = [line.split() for line in re.findall(r"^ {4}(docker compose .+)$", page, re.MULTILINE)]
    assert len(lines) == 4
    for words in lines:
        assert {word for word in words if word.endswith(("-gpu", "-rtx"))} <= set(COMPOSE["services"])
        assert "--profile" not in words or words[words.index("--profile") + 1] in PROFILES
    (run,) = [words for words in lines if "run" in words]
    spec = build_engine.parse(run[run.index("engines-gpu") + 1 :])
    assert str(spec.out) == load_settings(service("server-gpu")["command"], {}).engine


@pytest.mark.parametrize("name", SERVERS)
def test_compose_gives_the_server_time_to_drain(name: str) -> None:
    config = service(name)
    settings = load_settings(config.get("command", []), {})
    assert int(config["stop_grace_period"].removesuffix("s")) > settings.drain_delay_s + settings.shutdown_timeout_s


@pytest.mark.parametrize("name", [*SERVERS, "engines-gpu", "engines-second", "engines-rtx"])
def test_compose_drops_all_privileges(name: str) -> None:
    config = service(name)
    assert config["read_only"]
    assert config["tmpfs"] == ["/tmp"]
    assert config["cap_drop"] == ["ALL"]


def test_mounted_paths_and_volumes_exist() -> None:
    mounts = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", [])]
    local = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert [path for path in local if not (ROOT / path).exists()] == []
    assert {mount.split(":")[0] for mount in mounts if not mount.startswith("./")} == set(COMPOSE["volumes"])


def test_every_port_is_bound_to_this_host() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_prometheus_and_grafana_find_the_services() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for entry in job["static_configs"] for target in entry["targets"]]
    assert targets == [f"server:{Settings().port}"]
    for name in SERVERS[1:]:
        assert COMPOSE["services"][name]["networks"]["default"]["aliases"] == ["server"]
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"


class ReadyHandler(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health/ready" else 404)
        self.end_headers()
        self.wfile.write(b"loading")

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_follows_readiness(status: int | None, code: int) -> None:
    handler = type("Handler", (ReadyHandler,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        if status is None:
            server.socket.close()
        else:
            Thread(target=server.handle_request, daemon=True).start()
        process = subprocess.run(
            [sys.executable, ROOT / "deploy/healthcheck.py"],
            env={"SPRINT_PORT": str(server.server_port)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert process.returncode == code
    assert ("503 loading" in process.stderr) == (status == 503)
