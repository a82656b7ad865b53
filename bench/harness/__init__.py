"""Shared parts of the benchmarks: CLI, percentiles, host facts, server process, HTTP client, load generator."""
