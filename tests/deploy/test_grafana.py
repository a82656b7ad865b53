"""Validates the dashboard with the schema of Grafana's foundation SDK. `make deploy-tools` installs it."""

import json
from typing import Any

import pytest

from deploy.grafana import dashboard

models = pytest.importorskip(
    "grafana_foundation_sdk.models.dashboard", reason="Grafana's schema is not installed: make deploy-tools"
)


def through_the_schema(document: dict[str, Any]) -> dict[str, Any]:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    known: dict[str, Any] = json.loads(JSONEncoder().encode(models.Dashboard.from_json(document)))
    return known


def unknown(document: object, known: object, path: str = "") -> list[str]:
    """Lists the paths where `known`, which went through the schema, differs from `document`."""
    if isinstance(document, dict) and isinstance(known, dict):
        return [hit for key in document for hit in unknown(document[key], known.get(key, "nothing"), f"{path}/{key}")]
    if isinstance(document, list) and isinstance(known, list) and len(document) == len(known):
        pairs = enumerate(zip(document, known, strict=True))
        return [hit for index, (item, other) in pairs for hit in unknown(item, other, f"{path}/{index}")]
    return [] if document == known else [path]


def test_grafana_knows_every_field() -> None:
    document = json.loads(dashboard.text())
    assert unknown(document, through_the_schema(document)) == []


@pytest.mark.parametrize("part", ["options", "fieldConfig"])
def test_an_invented_field_is_found(part: str) -> None:
    document = json.loads(dashboard.text())
    document["panels"][1][part]["invented"] = 1
    assert unknown(document, through_the_schema(document)) == [f"/panels/1/{part}/invented"]
