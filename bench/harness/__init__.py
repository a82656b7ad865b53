"""What the benchmarks share: CLI, percentiles, host facts, server process, HTTP client, load generator."""
