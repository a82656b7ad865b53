"""Prometheus metrics, their aggregation over processes, logs, traces, stage timings."""
