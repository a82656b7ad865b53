"""The Grafana dashboard as rows of panels, and the JSON that Grafana imports.

`python deploy/grafana/dashboard.py` writes deploy/grafana/sana-sprint.json; a test keeps the two equal. Every query
reads the server's own metrics, so that the dashboard works without the recording rules.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PanelKind = Literal["stat", "timeseries", "heatmap", "table"]

HERE = Path(__file__).resolve().parent
WIDTH = 24  # columns of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTED = 'job=~"$job", instance=~"$instance"'  # servers, by the two variables at the top of the dashboard
IMAGE_ROUTES = "/generate|/v1/images/.*"


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the legend of its series, in which Grafana replaces `{{label}}`."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit` is Grafana's name of a unit; a stat is red from `red` on."""

    title: str
    kind: PanelKind
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
    labels = f"{SELECTED}, {more}" if more else SELECTED
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def total_rate(metric: str, more: str = "") -> str:
    labels = f"{SELECTED}, {more}" if more else SELECTED
    return f"sum(rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", more: str = "") -> str:
    groups = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', groups, more)})"


REQUESTS, SECONDS = "sana_sprint_requests_total", "sana_sprint_request_duration_seconds"
STAGE, BATCH = "sana_sprint_stage_duration_seconds", "sana_sprint_batch_size"
HITS, MISSES = "sana_sprint_prompt_cache_hits_total", "sana_sprint_prompt_cache_misses_total"
IMAGES, PADDING = "sana_sprint_images_total", "sana_sprint_batch_padding_total"
ERRORS = total_rate(REQUESTS, 'status=~"500|504"')
HIT_SHARE = f"{total_rate(HITS)} / ({total_rate(HITS)} + {total_rate(MISSES)})"
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))

ROWS = (
    Row(
        "Now",
        (
            Panel(
                "Servers ready", "stat",
                (Query(f"count(sana_sprint_engine_info{{{SELECTED}}}) or vector(0)"),),
                "Servers whose engine is loaded and warm.", width=4, height=4,
            ),
            Panel(
                "Images a second", "stat", (Query(total_rate(IMAGES)),),
                "Images of all sizes and steps.", width=4, height=4, decimals=1,
            ),
            Panel(
                "p95 of an image", "stat", (Query(quantile(0.95, SECONDS, more=f'route=~"{IMAGE_ROUTES}"')),),
                "From the first byte of a request to the last byte of its answer, on the image routes.",
                unit="s", width=4, height=4, red=2,
            ),
            Panel(
                "Errors", "stat", (Query(f"({ERRORS} or vector(0)) / {total_rate(REQUESTS)}"),),
                "Share of answers that are 500 or 504. 503, the answer of a draining server, does not count.",
                unit="percentunit", width=4, height=4, red=0.01, decimals=2,
            ),
            Panel(
                "Jobs waiting", "stat", (Query(f"sum(sana_sprint_jobs_waiting{{{SELECTED}}})"),),
                "Accepted and not yet in a batch.", width=4, height=4,
            ),
            Panel(
                "Cached prompts", "stat", (Query(HIT_SHARE),),
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
                "Images by size and number of steps.", stacked=True,
            ),
            Panel(
                "Jobs that never ran", "timeseries",
                (Query(rate("sana_sprint_jobs_dropped_total", "reason"), "{{reason}}"),),
                "queue_full: refused at once (429). deadline: passed before the job ran (504). client_gone: the client "
                "left. draining: not finished within the drain limit.",
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "Image, by quantile", "timeseries",
                tuple(Query(quantile(q, SECONDS, more=f'route=~"{IMAGE_ROUTES}"'), name) for q, name in QUANTILES),
                "Whole requests on the image routes.", unit="s",
            ),
            Panel(
                "Image, all requests", "heatmap",
                (Query(rate(f"{SECONDS}_bucket", "le", f'route=~"{IMAGE_ROUTES}"'), "{{le}}"),),
                "Requests by duration. Two bands are two kinds of requests: sizes, steps or batch sizes.",
                unit="s",
            ),
            Panel(
                "Time by stage", "timeseries",
                (Query(f"{rate(f'{STAGE}_sum', 'stage')} / {rate(f'{STAGE}_count', 'stage')}", "{{stage}}"),),
                "Mean time in each stage. Stages of a batch count for each of its jobs, and encoding overlaps the next "
                "batch, so the sum is the latency of a job, not the load of the engine.",
                unit="s", stacked=True,
            ),
            Panel(
                "p95 by stage", "timeseries", (Query(quantile(0.95, STAGE, "stage"), "{{stage}}"),),
                "Only queue grows: too little capacity. encode: too few CPU cores. The others: the GPU.",
                unit="s", width=12,
            ),
            Panel(
                "Decode, all jobs", "heatmap", (Query(rate(f"{STAGE}_bucket", "le", 'stage="decode"'), "{{le}}"),),
                "The decoder has the largest part of an image's work; its bands are batch sizes.", unit="s", width=12,
            ),
        ),
    ),
    Row(
        "Batches and queue",
        (
            Panel(
                "Jobs in a batch, mean", "timeseries",
                (Query(f"{total_rate(f'{BATCH}_sum')} / {total_rate(f'{BATCH}_count')}", "mean"),),
                "Rises with load: waiting jobs with an equal batch key run together.",
            ),
            Panel(
                "Batches by size", "heatmap", (Query(rate(f"{BATCH}_bucket", "le"), "{{le}}"),),
                "Batches by size.",
            ),
            Panel(
                "Padded slots", "timeseries",
                (Query(f"{total_rate(PADDING)} / ({total_rate(PADDING)} + {total_rate(f'{BATCH}_sum')})", "share"),),
                "Share of the slots that ran without a job, because buckets have fixed sizes.",
                unit="percentunit",
            ),
            Panel(
                "Waiting and running", "timeseries",
                (
                    Query(f"sum(sana_sprint_jobs_waiting{{{SELECTED}}})", "waiting"),
                    Query(f"sum(sana_sprint_jobs_running{{{SELECTED}}})", "running"),
                ),
                "Autoscaling follows the waiting jobs.", width=12,
            ),
            Panel(
                "Prompt cache", "timeseries",
                (Query(total_rate(HITS), "cached"), Query(total_rate(MISSES), "encoded")),
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
                "error: an exception. output: NaN or an empty image. out_of_memory: the batch was halved. hang: the "
                "process ends and restarts.",
            ),
            Panel(
                "GPU memory", "timeseries",
                (Query(f"sana_sprint_gpu_memory_bytes{{{SELECTED}}}", "{{instance}} {{replica}} {{kind}}"),),
                "Absent without a GPU.", unit="bytes",
            ),
            Panel(
                "Process memory", "timeseries",
                (Query(f"process_resident_memory_bytes{{{SELECTED}}}", "{{instance}} {{replica}}"),),
                "Resident memory of the server. It should be flat under load.", unit="bytes",
            ),
            Panel(
                "CPU", "timeseries",
                (Query(rate("process_cpu_seconds_total", "instance, replica"), "{{instance}} {{replica}}"),),
                "Cores in use by image encoding, or by the whole engine on a CPU.", width=12,
            ),
            Panel(
                "Engines", "table", (Query(f"sana_sprint_engine_info{{{SELECTED}}}"),),
                "Checkpoint, backend, precision and device of each server.", width=12,
            ),
        ),
    ),
)  # fmt: skip


def options(panel: Panel) -> dict[str, Any]:
    """Returns Grafana's `options` of a panel."""
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
    """Returns Grafana's `fieldConfig.defaults` of a panel."""
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red is not None:
        steps.append({"color": "red", "value": panel.red})
    config: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.decimals is not None:
        config["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        config["custom"] = {"fillOpacity": 30 if panel.stacked else 8, "showPoints": "never", "stacking": stacking}
        config["min"] = 0
    return config


def target(panel: Panel, query: Query, position: int) -> dict[str, Any]:
    form = {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series")
    result: dict[str, Any] = {
        "datasource": SOURCE,
        "expr": query.expr,
        "format": form,
        "refId": chr(ord("A") + position),
    }
    if query.legend:
        result["legendFormat"] = query.legend
    if panel.kind == "table":
        result["instant"] = True
    return result


def panels() -> list[dict[str, Any]]:
    """Returns all panels with their positions: rows below each other, panels side by side while they fit."""
    result: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        result.append({
            "id": len(result) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        })  # fmt: skip
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            config: dict[str, Any] = {"defaults": defaults(panel), "overrides": []}
            result.append({
                "id": len(result) + 1, "type": panel.kind, "title": panel.title, "description": panel.explanation,
                "datasource": SOURCE, "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
                "fieldConfig": config, "options": options(panel),
                "targets": [target(panel, query, index) for index, query in enumerate(panel.queries)],
            })  # fmt: skip
            x += panel.width
        y += row.panels[-1].height
    return result


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
