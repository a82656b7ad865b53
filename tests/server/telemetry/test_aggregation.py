"""Metrics of several replicas as one text."""

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.telemetry import aggregation


def text(count: int) -> bytes:
    registry = CollectorRegistry()
    images = Counter("images", "Generated.", ("size", "note"), registry=registry)
    images.labels("64", 'a "brace {" and a space').inc(count)
    Gauge("waiting", "Jobs.", registry=registry).set(count)
    return generate_latest(registry)


def test_every_sample_gets_its_replica_and_families_stand_together() -> None:
    whole = aggregation.merge_expositions({"0": text(1), "1": text(2)}).decode()
    assert whole.count("# TYPE images_total counter") == 1
    families = {family.name: family.samples for family in text_string_to_metric_families(whole)}
    assert {s.labels["replica"]: s.value for s in families["waiting"]} == {"0": 1, "1": 2}
    images = [s for s in families["images"] if s.name == "images_total"]
    assert {(s.labels["replica"], s.labels["note"], s.value) for s in images} == {
        ("0", 'a "brace {" and a space', 1),
        ("1", 'a "brace {" and a space', 2),
    }


def test_replicas_that_do_not_answer_are_omitted(tmp_path: Path) -> None:
    alive = text(3)

    async def gathered() -> bytes:
        async with await aggregation.serve_exposition(tmp_path / "0", lambda: alive):
            dead = await aggregation.serve_exposition(tmp_path / "1", lambda: b"waiting 4\n")
            dead.close()
            await dead.wait_closed()
            return await aggregation.scrape_workers(tmp_path)

    assert asyncio.run(gathered()) == aggregation.merge_expositions({"0": alive})
