"""Hours of mixed traffic with seeded faults: memory, files, threads and latencies over time."""
