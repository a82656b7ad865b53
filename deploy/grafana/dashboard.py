"""The Grafana dashboard as data: which questions it answers, in rows, and the JSON that Grafana imports.

`python deploy/grafana/dashboard.py` writes deploy/grafana/sana-sprint.json; a test keeps the two equal. Every query
reads the server's own metrics, so the dashboard works without the recording rules too. Knows PromQL and Grafana's panel
model; knows nothing of the server but its metric names.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["stat", "timeseries", "heatmap", "table"]

HERE = Path(__file__).resolve().parent
WIDTH = 24  # columns of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ON = 'job=~"$job", instance=~"$instance"'  # which servers: the two variables at the top of the dashboard
MADE = "/generate|/v1/images/.*"  # routes that make pictures


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how its series are called; `{{label}}` is replaced by Grafana."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One question. `unit` is Grafana's name of a unit; a stat turns red from `red` on."""

    title: str
    kind: Kind
    queries: tuple[Query, ...]
    explanation: str
    unit: str = "short"
    width: int = 8
    height: int = 8
    stacked: bool = False
    red: float | None = None
    decimals: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...] = field(default=())


def rate(metric: str, by: str, more: str = "") -> str:
    labels = f"{ON}, {more}" if more else ON
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def total_rate(metric: str, more: str = "") -> str:
    labels = f"{ON}, {more}" if more else ON
    return f"sum(rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", more: str = "") -> str:
    groups = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', groups, more)})"


REQUESTS, SECONDS = "sana_sprint_requests_total", "sana_sprint_request_duration_seconds"
STAGE, BATCH = "sana_sprint_stage_duration_seconds", "sana_sprint_batch_size"
HITS, MISSES = "sana_sprint_prompt_cache_hits_total", "sana_sprint_prompt_cache_misses_total"
IMAGES, PADDING = "sana_sprint_images_total", "sana_sprint_batch_padding_total"
FAULTS = total_rate(REQUESTS, 'status=~"500|504"')
HIT_SHARE = f"{total_rate(HITS)} / ({total_rate(HITS)} + {total_rate(MISSES)})"
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))

ROWS = (
    Row(
        "Now",
        (
            Panel(
                "Servers ready", "stat",
                (Query(f"count(sana_sprint_engine_info{{{ON}}}) or vector(0)"),),
                "Servers whose engine is loaded and warm.", width=4, height=4,
            ),
            Panel(
                "Images a second", "stat", (Query(total_rate(IMAGES)),),
                "Pictures made, all sizes and steps.", width=4, height=4, decimals=1,
            ),
            Panel(
                "p95 of a picture", "stat", (Query(quantile(0.95, SECONDS, more=f'route=~"{MADE}"')),),
                "From the first byte of a request to the last byte of its answer, for routes that make pictures.",
                unit="s", width=4, height=4, red=2,
            ),
            Panel(
                "Errors", "stat", (Query(f"({FAULTS} or vector(0)) / {total_rate(REQUESTS)}"),),
                "Share of answers that are 500 or 504. 503 is what a draining server should say and is not counted.",
                unit="percentunit", width=4, height=4, red=0.01, decimals=2,
            ),
            Panel(
                "Jobs waiting", "stat", (Query(f"sum(sana_sprint_jobs_waiting{{{ON}}})"),),
                "Accepted and not yet in a batch.", width=4, height=4,
            ),
            Panel(
                "Prompts found in the cache", "stat", (Query(HIT_SHARE),),
                "Share of jobs whose prompt was encoded before.", unit="percentunit", width=4, height=4, decimals=0,
            ),
        ),
    ),
    Row(
        "Traffic",
        (
            Panel(
                "Requests a second", "timeseries", (Query(rate(REQUESTS, "route, status"), "{{route}} {{status}}"),),
                "Every answered request by route and status.", unit="reqps", stacked=True,
            ),
            Panel(
                "Images a second", "timeseries",
                (Query(rate(IMAGES, "width, height, steps"), "{{width}}x{{height}}, {{steps}} steps"),),
                "Pictures by size and number of steps: what the engine's time is spent on.", stacked=True,
            ),
            Panel(
                "Jobs that never ran", "timeseries",
                (Query(rate("sana_sprint_jobs_dropped_total", "reason"), "{{reason}}"),),
                "queue_full was refused at once (429); deadline passed before the job ran (504); client_gone left; "
                "draining was not finished within the drain limit.",
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "Picture, by quantile", "timeseries",
                tuple(Query(quantile(q, SECONDS, more=f'route=~"{MADE}"'), name) for q, name in QUANTILES),
                "Whole requests on routes that make pictures.", unit="s",
            ),
            Panel(
                "Picture, all of them", "heatmap",
                (Query(rate(f"{SECONDS}_bucket", "le", f'route=~"{MADE}"'), "{{le}}"),),
                "How many requests took how long. Two bands mean two kinds of requests: sizes, steps or batch sizes.",
                unit="s",
            ),
            Panel(
                "Where the time goes", "timeseries",
                (Query(f"{rate(f'{STAGE}_sum', 'stage')} / {rate(f'{STAGE}_count', 'stage')}", "{{stage}}"),),
                "Mean time in each stage. Stages of a batch count for each of its jobs, and encoding overlaps the next "
                "batch, so the sum is a job's way and not the engine's load.",
                unit="s", stacked=True,
            ),
            Panel(
                "p95 by stage", "timeseries", (Query(quantile(0.95, STAGE, "stage"), "{{stage}}"),),
                "queue growing alone: too little capacity. encode: too few CPU cores. The others: the GPU.",
                unit="s", width=12,
            ),
            Panel(
                "Decode, all of them", "heatmap", (Query(rate(f"{STAGE}_bucket", "le", 'stage="decode"'), "{{le}}"),),
                "The decoder is the largest part of a picture's work; its bands are batch sizes.", unit="s", width=12,
            ),
        ),
    ),
    Row(
        "Batches and queue",
        (
            Panel(
                "Jobs in a batch, mean", "timeseries",
                (Query(f"{total_rate(f'{BATCH}_sum')} / {total_rate(f'{BATCH}_count')}", "mean"),),
                "Rises with load: what waits with an equal batch key runs together.",
            ),
            Panel(
                "Batches by size", "heatmap", (Query(rate(f"{BATCH}_bucket", "le"), "{{le}}"),),
                "How often batches of which size ran.",
            ),
            Panel(
                "Padded slots", "timeseries",
                (Query(f"{total_rate(PADDING)} / ({total_rate(PADDING)} + {total_rate(f'{BATCH}_sum')})", "share"),),
                "Of the slots that ran, the share that ran for nothing, because buckets have fixed sizes.",
                unit="percentunit",
            ),
            Panel(
                "Waiting and running", "timeseries",
                (
                    Query(f"sum(sana_sprint_jobs_waiting{{{ON}}})", "waiting"),
                    Query(f"sum(sana_sprint_jobs_running{{{ON}}})", "running"),
                ),
                "Autoscaling follows the waiting jobs.", width=12,
            ),
            Panel(
                "Prompt cache", "timeseries",
                (Query(total_rate(HITS), "found"), Query(total_rate(MISSES), "encoded")),
                "Lookups a second.", width=12, stacked=True,
            ),
        ),
    ),
    Row(
        "Engine and machine",
        (
            Panel(
                "Engine failures", "timeseries",
                (Query(rate("sana_sprint_engine_failures_total", "kind"), "{{kind}}"),),
                "error: an exception. output: NaN or an empty picture. out_of_memory: the batch was halved. hang: the "
                "process leaves and is restarted.",
            ),
            Panel(
                "GPU memory", "timeseries",
                (Query(f"sana_sprint_gpu_memory_bytes{{{ON}}}", "{{instance}} {{replica}} {{kind}}"),),
                "Absent where no GPU is.", unit="bytes",
            ),
            Panel(
                "Process memory", "timeseries",
                (Query(f"process_resident_memory_bytes{{{ON}}}", "{{instance}} {{replica}}"),),
                "Resident memory of the server. It should be flat under load.", unit="bytes",
            ),
            Panel(
                "CPU", "timeseries",
                (Query(rate("process_cpu_seconds_total", "instance, replica"), "{{instance}} {{replica}}"),),
                "Cores in use: image encoding, or the whole engine where it runs on the CPU.", width=12,
            ),
            Panel(
                "Engines", "table", (Query(f"sana_sprint_engine_info{{{ON}}}"),),
                "What runs where.", width=12,
            ),
        ),
    ),
)  # fmt: skip


def options(panel: Panel) -> dict[str, Any]:
    """Returns Grafana's `options` for this kind of panel."""
    match panel.kind:
        case "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        case "timeseries":
            return {
                "legend": {"displayMode": "list", "placement": "bottom"},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
        case "heatmap":
            color = {"mode": "scheme", "scheme": "Oranges", "steps": 64}
            return {"calculate": False, "color": color, "yAxis": {"unit": panel.unit}, "cellGap": 1}
        case "table":
            return {"showHeader": True}


def defaults(panel: Panel) -> dict[str, Any]:
    """Returns Grafana's `fieldConfig.defaults`."""
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red is not None:
        steps.append({"color": "red", "value": panel.red})
    found: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.decimals is not None:
        found["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        found["custom"] = {"fillOpacity": 30 if panel.stacked else 8, "showPoints": "never", "stacking": stacking}
        found["min"] = 0
    return found


def target(panel: Panel, query: Query, position: int) -> dict[str, Any]:
    form = {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series")
    found: dict[str, Any] = {
        "datasource": SOURCE,
        "expr": query.expr,
        "format": form,
        "refId": chr(ord("A") + position),
    }
    if query.legend:
        found["legendFormat"] = query.legend
    if panel.kind == "table":
        found["instant"] = True
    return found


def panels() -> list[dict[str, Any]]:
    """All panels with their places: rows one below the other, panels side by side while they fit."""
    found: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        found.append({
            "id": len(found) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        })  # fmt: skip
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            config: dict[str, Any] = {"defaults": defaults(panel), "overrides": []}
            found.append({
                "id": len(found) + 1, "type": panel.kind, "title": panel.title, "description": panel.explanation,
                "datasource": SOURCE, "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
                "fieldConfig": config, "options": options(panel),
                "targets": [target(panel, query, index) for index, query in enumerate(panel.queries)],
            })  # fmt: skip
            x += panel.width
        y += row.panels[-1].height
    return found


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name},
        "includeAll": True, "multi": True, "allValue": ".*", "refresh": 2, "sort": 1,
        "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}
    return {
        "uid": "sana-sprint", "title": "SANA-Sprint server", "tags": ["sana-sprint"], "schemaVersion": 41, "version": 1,
        "editable": True, "graphTooltip": 1, "refresh": "5s", "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser", "annotations": {"list": []}, "links": [],
        "templating": {"list": [
            source,
            variable("job", "Job", "label_values(sana_sprint_jobs_waiting, job)"),
            variable("instance", "Server", 'label_values(sana_sprint_jobs_waiting{job=~"$job"}, instance)'),
        ]},
        "panels": panels(),
    }  # fmt: skip


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "sana-sprint.json").write_text(text())
