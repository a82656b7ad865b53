"""The dashboard against Grafana's own schema, as its foundation SDK knows it. `make deploy-tools` brings it."""

import json
from typing import Any

import pytest

from deploy.grafana import dashboard

models = pytest.importorskip(
    "grafana_foundation_sdk.models.dashboard", reason="Grafana's schema is not installed: make deploy-tools"
)


def through_the_schema(given: dict[str, Any]) -> dict[str, Any]:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    found: dict[str, Any] = json.loads(JSONEncoder().encode(models.Dashboard.from_json(given)))
    return found


def unknown(given: object, known: object, path: str = "") -> list[str]:
    """Returns the paths at which `known`, parsed by the schema, lacks or changes a value of `given`."""
    if isinstance(given, dict) and isinstance(known, dict):
        return [hit for key in given for hit in unknown(given[key], known.get(key, "nothing"), f"{path}/{key}")]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        pairs = enumerate(zip(given, known, strict=True))
        return [hit for index, (one, other) in pairs for hit in unknown(one, other, f"{path}/{index}")]
    return [] if given == known else [path]


def test_grafana_knows_every_field() -> None:
    given = json.loads(dashboard.text())
    assert unknown(given, through_the_schema(given)) == []


@pytest.mark.parametrize("place", ["options", "fieldConfig"])
def test_an_invented_field_is_seen(place: str) -> None:
    given = json.loads(dashboard.text())
    given["panels"][1][place]["invented"] = 1
    assert unknown(given, through_the_schema(given)) == [f"/panels/1/{place}/invented"]
